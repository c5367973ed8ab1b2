"""Which records and which of their completions a stage reads: `kinds.as_kind` and `lowest_hashes` on flat arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.data.encodings import KINDS, Encodings
from rlhf_pipeline.data.kinds import picked, require_kinds, says, untied_pairs
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.disk.arrays import Array

_TEXT, _PAIR, _RANKING = (KINDS.index(kind) for kind in ("text", "pair", "ranking"))


@dataclass(frozen=True, eq=False)
class Chosen:
    """N items, each a record with some of its completions, M in all.

    record (N,), first (N + 1,): the record of each item, and its first completion. sequence: (M,) of the completions.
    whole: (N,) whether the item is the record as it is. kind: what the others are made into.
    """

    record: Array
    first: Array
    sequence: Array
    whole: Array
    kind: str | None

    def select(self, indices: Array) -> Chosen:
        """Return some of the items, by their numbers or by a mask."""
        if indices.dtype == bool and indices.all():
            return self
        counts = np.diff(self.first)[indices]
        first = _first(counts)
        sequence = self.sequence[ranges_from(self.first[:-1][indices], counts)]
        return Chosen(self.record[indices], first, sequence, self.whole[indices], self.kind)

    def prompt_keys(self, encodings: Encodings) -> list[str]:
        """The key of each item's prompt."""
        return hex_rows(encodings.table["keys"][self.record])

    def any(self, values: Array) -> Array:
        """Whether something is true of a completion of each item: (M,) to (N,)."""
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
        return sums[self.first[1:]] > sums[self.first[:-1]]

    def maximum(self, values: Array) -> Array:
        """The largest of some numbers >= 0 of each item's completions, 0 without any: (M,) to (N,)."""
        found = np.zeros(len(self.record), np.int64)
        np.maximum.at(found, np.repeat(np.arange(len(found)), np.diff(self.first)), values)
        return found

    def item(self, encodings: Encodings, number: int) -> Record:
        """Return an item as a record."""
        place = int(self.record[number])
        record = encodings.record(place)
        if self.whole[number]:
            return record
        assert self.kind is not None
        mine = self.sequence[int(self.first[number]) : int(self.first[number + 1])] - int(encodings.first[place]) - 1
        return picked(record, self.kind, *mine.tolist())


def choose(encodings: Encodings, rows: Array, kind: str | None, dropped: Counter[str], where: str = "") -> Chosen:
    """Return some records as a stage needs them: see `as_kind`; None: as they are.

    Args:
        rows: numbers of the records. dropped: counts what is left out, by reason. where: the source, for errors.

    Raises:
        DataError: some records cannot be converted to `kind`.
    """
    kinds = encodings.table["kinds"][rows]
    if kind is not None:
        require_kinds((KINDS[code] for code in np.unique(kinds)), kind, where)
    if kind == "prompt":
        first = np.sort(np.unique(_keys(encodings.table["keys"][rows]), return_index=True)[1])
        dropped["duplicate_prompt"] += len(rows) - len(first)
        nothing = np.zeros(0, np.int64)
        whole = kinds[first] == KINDS.index("prompt")
        return Chosen(rows[first], np.zeros(len(first) + 1, np.int64), nothing, whole, kind)
    starts, counts = encodings.first[rows] + 1, np.diff(encodings.first)[rows] - 1
    ranking = kinds == _RANKING
    if kind in ("preference", "order"):
        keep = np.ones(len(rows), bool)
        for number in np.flatnonzero(ranking).tolist():
            values = encodings.table["goodness"][starts[number] : starts[number] + counts[number]].tolist()
            keep[number] = says(values, ties=kind == "preference")
        dropped["tied_ranking"] += int((~keep).sum()) if kind == "preference" else 0
        rows, starts, counts = rows[keep], starts[keep], counts[keep]
        return Chosen(rows, _first(counts), ranges_from(starts, counts), np.ones(len(rows), bool), kind)
    if kind == "pair" and ranking.any():
        return _all_pairs(encodings, rows, ranking, dropped)
    if kind == "labelled":  # each completion by itself
        sequence, whole = ranges_from(starts, counts), np.repeat(kinds == KINDS.index(kind), counts)
        return Chosen(np.repeat(rows, counts), np.arange(len(sequence) + 1), sequence, whole, kind)
    whole = np.ones(len(rows), bool) if kind is None else (kinds == KINDS.index(kind)) | (kinds == _TEXT)
    if kind == "demonstration":
        for number in np.flatnonzero(ranking).tolist():
            starts[number] += np.argmax(encodings.table["goodness"][starts[number] : starts[number] + counts[number]])
        counts = np.minimum(counts, 1)
    return Chosen(rows, _first(counts), ranges_from(starts, counts), whole, kind)


def ties(encodings: Encodings, rows: Array) -> list[int]:
    """Return those of some records that are rankings with ties."""
    found = []
    for row in rows[encodings.table["kinds"][rows] == _RANKING].tolist():
        values = encodings.table["goodness"][int(encodings.first[row]) + 1 : int(encodings.first[row + 1])].tolist()
        found += [] if says(values, ties=False) else [row]
    return found


def _all_pairs(encodings: Encodings, rows: Array, ranking: Array, dropped: Counter[str]) -> Chosen:
    """Return pairs, and all untied pairs of rankings."""
    record: list[int] = []
    sequence: list[int] = []
    for row, several in zip(rows.tolist(), ranking.tolist()):
        start, end = int(encodings.first[row]) + 1, int(encodings.first[row + 1])
        pairs = untied_pairs(encodings.table["goodness"][start:end].tolist()) if several else [(0, 1)]
        dropped["tied_ranking"] += not pairs
        record += [row] * len(pairs)
        sequence += [start + k for pair in pairs for k in pair]
    of = np.array(record, np.int64)
    whole = encodings.table["kinds"][of] == _PAIR
    return Chosen(of, _first(np.full(len(of), 2)), np.array(sequence, np.int64), whole, "pair")


def hex_rows(values: Array) -> list[str]:
    """Return each row of bytes as text."""
    text, width = values.tobytes().hex(), 2 * values.shape[1]
    return [text[start : start + width] for start in range(0, len(text), width)]


def _keys(keys: Array) -> Array:
    """Return rows of bytes as values that can be compared."""
    return np.ascontiguousarray(keys).view(f"V{keys.shape[1]}").ravel()


def _first(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def ranges_from(starts: Array, counts: Array) -> Array:
    """Return start, start + 1, ... of each range, one range behind another."""
    behind = np.cumsum(counts)
    total = int(behind[-1]) if len(behind) else 0
    return np.repeat(starts - (behind - counts), counts) + np.arange(total)
