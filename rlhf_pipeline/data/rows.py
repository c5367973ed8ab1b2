"""The records of a large source: one line of JSON each, in a table on disk, and made when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from rlhf_pipeline.data.records import Record, Text
from rlhf_pipeline.disk.arrays import Array, Table, Writer, release

_ROWS = 4096  # records that are written at once, or read before their pages are released
_PIECE = 1 << 23  # bytes of lines that are read before their pages are released


class Unstorable(Exception):
    """Records have values that JSON does not have, or their files are changed while they are read."""


@dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """Records of a store, each made when it is asked for.

    table: see `write_records`. rows: the numbers of the records in it. folder: of the table.
    split: the split of all, in place of their own.
    """

    table: Table
    rows: Array
    folder: Path
    say: Callable[[str], None]
    split: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        row = int(self.rows[index])
        content = json.loads(self.table.text("lines", row))
        where, columns, instruction, turns, alone, ordered = json.loads(self.table.text("beside", row))
        prompt, completions, extra = ordered or (content["prompt"], content["completions"], content["extra"])
        prompt_ids, completion_ids = content["prompt_ids"], content["completion_ids"]
        return Record(
            content["kind"],
            _text(prompt),
            tuple(map(_text, completions)),
            tuple(content["ended"]),
            where,
            self.split or alone,
            None if prompt_ids is None else tuple(prompt_ids),
            None if completion_ids is None else tuple(map(tuple, completion_ids)),
            {name: tuple(value) if name in ("ranks", "scores") else value for name, value in extra.items()},
            None if instruction is None else (instruction[0], instruction[1]),
            turns,
            columns,
        )

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _ROWS):
            yield from map(self.__getitem__, range(start, min(start + _ROWS, len(self))))
            self.table.release()

    def select(self, mask: Any) -> Records:
        """Return some of the records, by their numbers or by a mask."""
        return replace(self, rows=self.rows[mask])

    def where(self, number: int) -> str:
        """Return the place of a record's row."""
        return str(json.loads(self.table.text("beside", int(self.rows[number])))[0])

    @property
    def splits(self) -> list[str | None]:
        """The source's own split of each record."""
        if self.split is not None:
            return [self.split] * len(self)
        names = [*self.table.about["splits"], None]
        return [names[code] for code in self.table["splits"][self.rows].tolist()]

    @property
    def own_splits(self) -> set[str | None]:
        """The source's own splits."""
        if self.split is not None:
            return {self.split}
        names = [*self.table.about["splits"], None]
        return {names[code] for code in np.unique(self.table["splits"][self.rows]).tolist()}

    def blank(self) -> list[Record]:
        """Return the records whose prompt is text that is empty or white space."""
        return [self[number] for number in np.flatnonzero(self.table["blank"][self.rows]).tolist()]

    def digest(self) -> str:
        """Return `records_digest`."""
        found, lines, ends, rows = sha256(), self.table["lines"], self.table["lines_ends"], self.rows
        if not len(rows):
            return found.hexdigest()
        content, seen = lines.data, 0
        # Rows that are one behind another in the table are one range of bytes.
        breaks = np.flatnonzero(np.diff(rows) != 1)
        first, last = rows[np.append(0, breaks + 1)], rows[np.append(breaks, len(rows) - 1)]
        starts = np.where(first > 0, ends[first - 1], 0)
        for start, end in zip(starts.tolist(), ends[last].tolist()):
            for at in range(start, end, _PIECE):
                part = content[at : min(at + _PIECE, end)]
                found.update(part)
                seen += len(part)
                if seen >= _PIECE:
                    release(lines)
                    seen = 0
        release(lines)
        return found.hexdigest()


def _text(content: Any) -> Text:
    return tuple(content) if isinstance(content, list) else content


@dataclass(frozen=True, eq=False)
class Joined(Sequence[Record]):
    """Records of several sources, one behind another; those of some are in stores."""

    parts: tuple[Sequence[Record], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        place = range(len(self))[index]
        for part in self.parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(self.parts)


def join_records(parts: Sequence[Sequence[Record]]) -> Sequence[Record]:
    """Return the records of several sources, one behind another."""
    some = tuple(part for part in parts if len(part))
    if any(isinstance(part, (Records, Joined)) for part in some):
        return some[0] if len(some) == 1 else Joined(some)
    return [record for part in some for record in part]


def keep(records: Sequence[Record], mask: Sequence[bool]) -> Sequence[Record]:
    """Return the records for which a mask is true."""
    if isinstance(records, Joined):
        starts = accumulate(map(len, records.parts), initial=0)
        masks = [mask[start : start + len(part)] for start, part in zip(starts, records.parts)]
        return join_records([keep(part, own) for part, own in zip(records.parts, masks)])
    if isinstance(records, Records):
        return records.select(np.array(mask, bool))
    return [record for record, kept in zip(records, mask) if kept]


def splits_of(records: Sequence[Record]) -> list[str | None]:
    """Return the source's own split of each record."""
    if isinstance(records, Joined):
        return [split for part in records.parts for split in splits_of(part)]
    return records.splits if isinstance(records, Records) else [record.split for record in records]


def own_splits(records: Sequence[Record]) -> set[str | None]:
    """Return the source's own splits."""
    if isinstance(records, Joined):
        return {split for part in records.parts for split in own_splits(part)}
    return records.own_splits if isinstance(records, Records) else {record.split for record in records}


def in_one_split(records: Sequence[Record], split: str) -> Sequence[Record]:
    """Return the records with a split in place of their own."""
    return (
        replace(records, split=split)
        if isinstance(records, Records)
        else [replace(one, split=split) for one in records]
    )


def places_of(records: Sequence[Record]) -> Iterator[str]:
    """Yield the place of each record's row."""
    if isinstance(records, Joined):
        return chain.from_iterable(map(places_of, records.parts))
    if isinstance(records, Records):
        return map(records.where, range(len(records)))
    return (record.where for record in records)


def blank_records(records: Sequence[Record]) -> list[Record]:
    """Return the records whose prompt is text that is empty or white space."""
    if isinstance(records, Joined):
        return [record for part in records.parts for record in blank_records(part)]
    return records.blank() if isinstance(records, Records) else [one for one in records if is_blank(one.prompt)]


def write_records(writer: Writer, records: Iterable[Record]) -> list[str]:
    """Write records and return the names of their splits.

    The arrays are `lines` (the canonical JSON, which digests are made of), `beside` (the rest), `keys` (records, 32)
    (the prompt's SHA-256), `splits` (numbers of the names that are returned, -1: none) and `blank` (the prompt is text
    that is empty or white space).

    Raises:
        Unstorable: a record has values that JSON does not have.
    """
    codes: dict[str | None, int] = {None: -1}
    records, done = iter(records), 0
    batch = list(islice(records, _ROWS))
    while batch or not done:
        writer.texts("lines", [record.canonical() + "\n" for record in batch])
        writer.texts("beside", [_beside(record) for record in batch])
        keys = bytes.fromhex("".join(record.prompt_key for record in batch))
        writer.add("keys", np.frombuffer(keys, np.uint8).reshape(-1, 32))
        for record in batch:
            codes.setdefault(record.split, len(codes) - 1)
        writer.add("splits", np.array([codes[record.split] for record in batch], np.int32))
        writer.add("blank", np.array([is_blank(record.prompt) for record in batch], bool))
        done += max(1, len(batch))
        batch = list(islice(records, _ROWS))
    return [name for name in codes if name is not None]


def is_blank(prompt: Text | None) -> bool:
    """Whether a prompt is text that is empty or white space."""
    return isinstance(prompt, str) and (not prompt or prompt.isspace())


def _beside(record: Record) -> str:
    """Return what the canonical JSON does not have, or has in another order: messages and what templates read."""
    ordered = record.conversational or bool(record.extra)
    content = [record.prompt, record.completions, dict(record.extra)] if ordered else None
    try:
        return json.dumps([record.where, record.columns, record.instruction, record.turns, record.split, content])
    except (TypeError, ValueError) as error:
        raise Unstorable(f"{record.where}: {error}") from error
