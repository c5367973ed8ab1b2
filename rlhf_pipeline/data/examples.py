"""Examples: a prompt with its completions as token ids, within the length limits.

`Examples` holds many of them as ranges of flat arrays (`encodings.py`) and makes an `Example` when it is asked for one.
Those of a small source in memory are kept once they are made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, overload

import numpy as np

from rlhf_pipeline.data.choices import hex_rows, ranges_from
from rlhf_pipeline.data.encodings import COLUMNS, KINDS, MESSAGES, Encodings
from rlhf_pipeline.data.records import Messages, messages
from rlhf_pipeline.data.rows import Records
from rlhf_pipeline.disk.arrays import Array

BLOCK = 4096
"""Examples whose ids are read at once."""

KEPT_IDS = 2**20
"""Ids of a source, at most, whose examples are kept once they are made: about 40 MB of lists."""


@dataclass
class Example:
    """One prompt and its K completions as token ids; a completion includes its stop token if it `ended`."""

    prompt_ids: list[int]
    completions: list[list[int]]
    ended: list[bool]
    prompt_key: str
    where: str
    label_probability: float | None = None  # P(first preferred over second); None: a hard label
    margin: float | None = None  # of a pair: by how much the reward of the first should be higher; None: not known
    desirable: bool | None = None  # the label of the only completion; None: there is none
    prompt_text: str = ""
    completion_texts: tuple[str, ...] = ()
    ranks: tuple[int, ...] | None = None  # of a ranking, ascending; equal ones are ties. None: best first, no ties
    prompt_truncated: bool = False
    trained: list[bool] | None = None  # of the tokens of the only completion: whether SFT trains it; None: all
    messages: Messages | None = None  # of a chat: the turns of the whole prompt
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the row; a format reads none of them

    @property
    def tokens_trained(self) -> int:
        """The number of completion tokens that SFT trains."""
        return sum(map(len, self.completions)) if self.trained is None else sum(self.trained)

    def untied(self) -> list[tuple[int, int]]:
        """Return the pairs (i, j) in which completion i is preferred to j.

        A pair gives [(0, 1)]; a single completion gives [].
        """
        if len(self.completions) == 2 and self.ranks is None:
            return [(0, 1)]
        return untied(self.completions, self.ranks)


def untied(completions: Sequence[Sequence[int]], ranks: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return the pairs (i, j) in which completion i ranks above j; equal responses form no pair.

    Args:
        ranks: one per completion, 1 for the best; None: completions are ordered best first, without ties.
    """
    ranks = range(len(completions)) if ranks is None else ranks
    pairs = combinations(range(len(completions)), 2)
    ordered = ((i, j) if ranks[i] < ranks[j] else (j, i) for i, j in pairs if ranks[i] != ranks[j])
    return [(i, j) for i, j in ordered if completions[i] != completions[j]]


@dataclass(frozen=True, eq=False)
class View:
    """N examples with M completions, as ranges of the ids of records.

    encodings: where ids and texts are. of: what the examples are made of, where it is something else (a conversation
        that was shortened).
    record, prompt (N, 2), bos, truncated: (N,) the record, the range of its prompt, whether a BOS is put before it, and
        whether it was cut.
    first: (N + 1,) the first completion of each example. ranges (M, 2), sequence, ended, ranks: (M,) of completions;
        sequence -1: a part of a text; rank 0: there are no ranks.
    trained: (N,) whether some tokens of the completion are not trained.
    own: (N,) whether an example has all of its record, also the probability of its label and its margin.
    sides: whether a pair's sides are columns. moved: whether each is a `whole_sequence`. labelled: whether completions
        of pairs are good or bad by themselves.
    """

    encodings: Encodings
    record: Array
    prompt: Array
    bos: Array
    truncated: Array
    first: Array
    ranges: Array
    sequence: Array
    ended: Array
    ranks: Array
    trained: Array
    own: Array
    sides: bool = False
    moved: bool = False
    labelled: bool = False
    of: tuple[Encodings, Array] | None = None

    def __len__(self) -> int:
        return len(self.record)

    @functools.cached_property
    def counts(self) -> Array:
        """The completions of each example: (N,)."""
        return np.diff(self.first)

    @functools.cached_property
    def tree_lengths(self) -> Array:
        """The tokens of each example: (N,)."""
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.ranges[:, 1] - self.ranges[:, 0])])
        return self.prompt[:, 1] - self.prompt[:, 0] + self.bos + sums[self.first[1:]] - sums[self.first[:-1]]

    @functools.cached_property
    def keys(self) -> Array:
        """The prompt's SHA-256 of each example: (N, 32)."""
        encodings, record = self.of or (self.encodings, self.record)
        return encodings.table["keys"][record]

    @functools.cached_property
    def first_lengths(self) -> Array:
        """The tokens of the first completion of each example: (N,)."""
        firsts = self.ranges[self.first[:-1]]
        return firsts[:, 1] - firsts[:, 0] + (self.prompt[:, 1] - self.prompt[:, 0] + self.bos - 1) * self.moved

    @functools.cached_property
    def cut(self) -> Array:
        """The completions of each example that did not end: (N,)."""
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(~self.ended)])
        return sums[self.first[1:]] - sums[self.first[:-1]]

    @functools.cached_property
    def pairs(self) -> Array:
        """Whether each example is one pair, without ranks: (N,)."""
        two = self.counts == 2
        two[two] = self.ranks[self.first[:-1][two]] == 0
        return two

    def _spans(self, places: Array) -> tuple[Array, Array, Array]:
        """Return the ranges (P, 2) of the prompts, without a BOS, and completions of some examples, by their numbers,
        and where in them each example begins and ends."""
        counts = self.counts[places] + 1
        ends = np.cumsum(counts)
        prompts = ends - counts
        completes = np.ones(int(ends[-1]), bool)
        completes[prompts] = False
        spans = np.empty((len(completes), 2), np.int64)
        spans[prompts] = self.prompt[places]
        spans[completes] = self.ranges[ranges_from(self.first[:-1][places], counts - 1)]
        return spans, prompts, ends

    def part_sizes(self, places: Array) -> Iterator[list[int]]:
        """Yield `part_sizes` of some examples, by their numbers; not for a view of whole sequences."""
        spans, prompts, ends = self._spans(places)
        sizes = spans[:, 1] - spans[:, 0]
        sizes[prompts] += self.bos[places]
        numbers = sizes.tolist()
        return (numbers[first:behind] for first, behind in zip(prompts.tolist(), ends.tolist()))

    def parts(self, places: Array) -> Iterator[tuple[list[int], Array]]:
        """Yield `parts_of` some examples, by their numbers; not for a view of whole sequences."""
        spans, prompts, ends = self._spans(places)
        sizes = spans[:, 1] - spans[:, 0]
        ids = self.encodings.table["ids"][ranges_from(spans[:, 0], sizes)].astype(np.int64)
        begun = prompts[self.bos[places].astype(bool)]
        if self.encodings.bos is not None and len(begun):
            ids = np.insert(ids, (np.cumsum(sizes) - sizes)[begun], self.encodings.bos)
            sizes[begun] += 1
        numbers, at = sizes.tolist(), 0
        for first, behind in zip(prompts.tolist(), ends.tolist()):
            mine = numbers[first:behind]
            yield mine, ids[at : at + sum(mine)]
            at += sum(mine)

    def texts_and_ranks(self, n: int) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
        """Return the texts of an example's completions, none of a part of a text, and their ranks."""
        first, behind = int(self.first[n]), int(self.first[n + 1])
        sequences = self.sequence[first:behind].tolist()
        if not sequences or sequences[0] < 0:
            return (), None
        texts = tuple(self.encodings.table.text("texts", one) for one in sequences)
        return texts, tuple(self.ranks[first:behind].tolist()) if self.ranks[first] else None

    @functools.cached_property
    def _kept(self) -> dict[int, Example] | None:
        """The examples that have been made; None: they are made anew each time, because they are stored, or many, or
        parts of a text, which are read once."""
        encodings = self.encodings if self.of is None else self.of[0]
        few = len(encodings.table["ids"]) <= KEPT_IDS
        of_text = len(self.sequence) > 0 and self.sequence[0] < 0
        return {} if few and not of_text and not isinstance(encodings.records, Records) else None

    def example(self, n: int) -> Example:
        """Return an example."""
        found = None if self._kept is None else self._kept.get(n)
        if found is None:
            found = whole_sequence(self._made(n)) if self.moved else self._made(n)
            if self._kept is not None:
                self._kept[n] = found
        return found

    def _made(self, n: int) -> Example:
        encodings, number = self.encodings, int(self.record[n])
        source, place = (encodings, number) if self.of is None else (self.of[0], int(self.of[1][n]))
        table, ids = encodings.table, encodings.table["ids"]
        first, behind = int(self.first[n]), int(self.first[n + 1])
        start, end = self.prompt[n].tolist()
        prompt = ids[start:end].tolist()
        if self.bos[n]:
            prompt = [encodings.bos, *prompt]
        ranges, sequences = self.ranges[first:behind].tolist(), self.sequence[first:behind].tolist()
        made = Example(
            prompt,
            [ids[a:b].tolist() for a, b in ranges],
            self.ended[first:behind].tolist(),
            source.table["keys"][place].tobytes().hex(),
            source.where(place),
        )
        if sequences and sequences[0] < 0:
            return made
        made.prompt_text = table.text("texts", int(encodings.first[number]))
        made.completion_texts, made.ranks = self.texts_and_ranks(n)
        made.prompt_truncated = bool(self.truncated[n])
        if self.own[n]:
            made.label_probability = _known(source.table["probability"][place])
            made.margin = _known(source.table["margin"][place])
        if sequences and (self.labelled or KINDS[encodings.table["kinds"][number]] == "labelled"):
            made.desirable = bool(encodings.table["goodness"][sequences[0]])
        if self.trained[n]:
            ((a, b),) = ranges
            made.trained = table["trained"][a:b].astype(bool).tolist()
        if self.sides or int(source.table["flags"][place]) & (MESSAGES | COLUMNS):
            record = source.record(place)
            made.messages = messages(record.prompt) if record.conversational and record.prompt is not None else None
            made.columns = record.columns
            if self.sides and record.kind == "pair":
                made.columns = {**record.columns, **dict(zip(("chosen", "rejected"), record.completions))}
        return made


def _known(number: float) -> float | None:
    """Return a number of a record; None if the record has none."""
    return None if np.isnan(number) else float(number)


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """A sequence of examples, each made when it is asked for: number `place[n]` of view `view[n]`."""

    views: tuple[View, ...]
    view: Array
    place: Array

    @classmethod
    def of(cls, view: View) -> Examples:
        """Return all examples of a view."""
        return cls((view,), np.zeros(len(view), np.int16), np.arange(len(view)))

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """Return the examples of several sequences, one behind another."""
        before = np.cumsum([0, *(len(part.views) for part in parts)])
        views = tuple(view for part in parts for view in part.views)
        numbers = np.concatenate([part.view + shift for part, shift in zip(parts, before)])
        return cls(views, numbers, np.concatenate([part.place for part in parts]))

    def __len__(self) -> int:
        return len(self.place)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self.views[self.view[index]].example(int(self.place[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))

    def select(self, indices: Any) -> Examples:
        """Return some of the examples, by their numbers or by a mask."""
        return replace(self, view=self.view[indices], place=self.place[indices])

    def collect(self, name: str) -> Array:
        """Return an attribute of the views for each example."""
        values = [getattr(view, name) for view in self.views]
        if len(values) == 1:
            return values[0][self.place]
        found = np.zeros((len(self), *values[0].shape[1:]), values[0].dtype)
        for number, value in enumerate(values):
            mine = self.view == number
            found[mine] = value[self.place[mine]]
        return found

    def whole(self) -> Examples:
        """Return `whole_sequence` of each example."""
        return replace(self, views=tuple(replace(view, moved=True) for view in self.views))


def part_sizes(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Yield of each example the numbers of ids of its prompt and its completions. Most examples are not made for it."""
    if isinstance(examples, Examples) and _in_one_view(examples):
        for start in range(0, len(examples), BLOCK):
            yield from examples.views[0].part_sizes(examples.place[start : start + BLOCK])
        return
    for example in examples:
        yield [len(example.prompt_ids), *map(len, example.completions)]


def _in_one_view(examples: Examples) -> bool:
    """Whether the ranges of one view say what the parts of all examples are."""
    return len(examples.views) == 1 and not examples.views[0].moved


def parts_of(examples: Sequence[Example]) -> Iterator[tuple[list[int], Array]]:
    """Yield of each example its `part_sizes`, and these ids (int64) in one array. Most examples are not made for it."""
    if isinstance(examples, Examples) and _in_one_view(examples):
        for start in range(0, len(examples), BLOCK):
            yield from examples.views[0].parts(examples.place[start : start + BLOCK])
        return
    for example in examples:
        parts = [example.prompt_ids, *example.completions]
        yield [len(part) for part in parts], np.array([one for part in parts for one in part], np.int64)


def texts_and_ranks(examples: Sequence[Example]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...] | None]]:
    """Yield the texts of each example's completions and their ranks. Stored examples are not made for it."""
    if not isinstance(examples, Examples):
        yield from ((example.completion_texts, example.ranks) for example in examples)
        return
    for view, place in zip(examples.view.tolist(), examples.place.tolist()):
        yield examples.views[view].texts_and_ranks(place)


def made_once(examples: Sequence[Example]) -> Sequence[Example]:
    """Return a list of the examples, for several readings, unless they are many."""
    return list(examples) if len(examples) <= BLOCK else examples


def pick(examples: Sequence[Example], indices: Any) -> Sequence[Example]:
    """Return some examples, by their numbers."""
    return examples.select(indices) if isinstance(examples, Examples) else [examples[index] for index in indices]


def join(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """Return the examples of several sequences, one behind another."""
    stored = [part for part in parts if isinstance(part, Examples)]
    return Examples.joined(stored) if len(stored) == len(parts) else [example for part in parts for example in part]


def prompt_keys(examples: Sequence[Example]) -> list[str]:
    """Return the key of each example's prompt."""
    if not isinstance(examples, Examples):
        return [example.prompt_key for example in examples]
    return hex_rows(examples.collect("keys"))


def tree_lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each example."""
    if isinstance(examples, Examples):
        return examples.collect("tree_lengths").tolist()
    return [len(example.prompt_ids) + sum(len(ids) for ids in example.completions) for example in examples]


def response_counts(examples: Sequence[Example]) -> list[int]:
    """Return the number of completions of each example."""
    if isinstance(examples, Examples):
        return examples.collect("counts").tolist()
    return [len(example.completions) for example in examples]


def first_lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each example's first completion."""
    if isinstance(examples, Examples):
        return examples.collect("first_lengths").tolist()
    return [len(example.completions[0]) for example in examples]


def count_cut(examples: Sequence[Example]) -> int:
    """Return how many completions were cut before they ended."""
    if isinstance(examples, Examples):
        return int(examples.collect("cut").sum())
    return sum(not ended for example in examples for ended in example.ended)


def count_pairs(examples: Sequence[Example]) -> int:
    """Return the number of untied pairs of all examples."""
    if not isinstance(examples, Examples):
        return sum(len(example.untied()) for example in examples)
    plain = examples.collect("pairs")
    return int(plain.sum()) + sum(len(example.untied()) for example in examples.select(~plain))


def all_whole(examples: Sequence[Example]) -> Sequence[Example]:
    """Return `whole_sequence` of each example."""
    return examples.whole() if isinstance(examples, Examples) else [whole_sequence(example) for example in examples]


def whole_sequence(example: Example) -> Example:
    """Return the example with all but its first prompt token moved into its one completion.

    Raises:
        ValueError: it has not exactly one completion.
    """
    if len(example.completions) != 1:
        raise ValueError(f"{example.where}: expected one completion, found {len(example.completions)}")
    joined = example.prompt_ids[1:] + example.completions[0]
    return replace(example, prompt_ids=example.prompt_ids[:1], completions=[joined], trained=None)
