"""Packed batches: the input of every model in every stage.

A row holds one or more trees. A tree is a prompt followed by K >= 1 completions. Each completion attends to the
prompt and to itself, not to its siblings, and continues the prompt's positions. A pair therefore costs one forward
pass over prompt + chosen + rejected, with almost no padding.

There are three layouts, from the fastest to the one that every model can read. The index vectors mean the same in all:
* flat: one row holds all trees without padding; for attention that receives the borders of the trees
  (algorithms/attention.py). If all trees are short, the layout "trees" is used instead, because it is faster.
* trees: rows of one length with a 4-D mask.
* rows: one plain, right-padded row per completion.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pipeline.data.tokenize import Example

Layout = Literal["flat", "trees", "rows"]
LAYOUTS: tuple[Layout, ...] = ("rows", "trees", "flat")  # a reader of one layout also reads those before it
FILLER = 0  # the id of unused positions: every embedding has it, also where the tokenizer has no PAD
FLAT_FROM = 64  # tokens; if the longest tree is shorter, masked rows are faster


def common_layout(*layouts: Layout) -> Layout:
    """Return the fastest layout that all readers can read."""
    return min(layouts, key=LAYOUTS.index)


def reads(layout: Layout, batch: PackedBatch | None) -> bool:
    """Whether a reader of `layout` can read a batch."""
    return batch is not None and LAYOUTS.index(batch.layout) <= LAYOUTS.index(layout)


@dataclass(frozen=True)
class Counted:
    """The counts of examples that are not packed, as trees: what FLOPs depend on; see `PackedBatch` for each."""

    active_tokens: int = 0
    context_tokens: int = 0
    num_tokens: int = 0
    num_completions: int = 0
    num_predicting: int = 0

    def __add__(self, other: Counted) -> Counted:
        return Counted(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Counted:
        return Counted(*(mine * times for mine in astuple(self)))


def counted(examples: Iterable[Example]) -> Counted:
    """Return the counts that `pack` would give these examples in the layouts "flat" and "trees"."""
    active = context = tokens = completions = prompts = 0
    for example in examples:
        prompt, lengths = len(example.prompt_ids), [len(ids) for ids in example.completions]
        active += prompt + sum(lengths)
        context += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
        tokens += example.tokens_trained
        completions += len(lengths)
        prompts += 1
    return Counted(active, context, tokens, completions, tokens - completions + prompts)


@dataclass(frozen=True)
class PackedBatch:
    """Examples as tensors: B rows, T positions, C completions, N completion tokens; flat position b * T + t.

    Completions are numbered in the order of the examples, in whichever row they are. The N tokens are without those
    that an example does not train (`Example.trained`).
    """

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    tree: Tensor  # (B, T) number of the tree within its row, -1 at padding
    branch: Tensor  # (B, T) 0 in the prompt, i in the tree's i-th completion
    predict_index: Tensor  # (N,) flat position whose hidden state predicts the token
    token_index: Tensor  # (N,) flat position of the token itself
    target_ids: Tensor  # (N,)
    completion_index: Tensor  # (N,) completion that the token belongs to
    offset: Tensor  # (N,) index of the token in its completion
    lengths: Tensor  # (C,) tokens of each completion
    last_index: Tensor  # (C,) flat position of each completion's last token
    layout: Layout
    active_tokens: int  # positions that are not padding
    context_tokens: int  # sum over active positions of the tokens that each one attends to, itself included
    num_prompts: int = 0  # prompts in the rows: one per tree; one per completion in the layout "rows"
    trees: tuple[tuple[int, tuple[int, ...]], ...] = ()  # flat: tokens of each tree's prompt and completions, in order

    @property
    def num_completions(self) -> int:
        return self.lengths.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.target_ids.shape[0]

    @property
    def num_predicting(self) -> int:
        """Number of positions that predict a token; a prompt's last position predicts the first of each completion."""
        return self.num_tokens - self.num_completions + self.num_prompts

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def per_completion(self, values: Tensor) -> Tensor:
        """Sum (N,) token values into (C,) completion values."""
        return values.new_zeros(self.num_completions).index_add(0, self.completion_index, values)

    def padded(self, values: Tensor, width: int | None = None) -> Tensor:
        """Arrange (N,) token values in a (C, R) matrix, with zeros for padding."""
        width = width or int(self.lengths.max())
        flat = values.new_zeros(self.num_completions * width)
        return flat.index_copy(0, self.completion_index * width + self.offset, values).view(-1, width)

    def mask(self, width: int | None = None) -> Tensor:
        """Return a (C, R) bool mask, true for tokens."""
        width = width or int(self.lengths.max())
        return torch.arange(width, device=self.lengths.device) < self.lengths[:, None]


def tree_length(example: Example) -> int:
    """Return the number of positions of an example in the layout "trees"."""
    return len(example.prompt_ids) + sum(len(ids) for ids in example.completions)


def micro_batches(examples: Sequence[Example], size: int, tokens: int | None = None) -> list[list[int]]:
    """Divide the examples of an optimizer step into groups of similar length; returns indices.

    A group has at most `size` examples, and at most `tokens` tokens unless it is a single example.
    """
    order = sorted(range(len(examples)), key=lambda index: (-tree_length(examples[index]), index))
    if tokens is None:
        return [order[start : start + size] for start in range(0, len(order), size)]
    groups: list[list[int]] = []
    room = 0
    for index in order:
        length = tree_length(examples[index])
        if not groups or len(groups[-1]) == size or length > room:
            groups.append([])
            room = tokens
        groups[-1].append(index)
        room -= length
    return groups


def merge_prompts(examples: Sequence[Example]) -> list[Example]:
    """Merge neighbouring examples with the same prompt into one tree; completions keep their order."""
    merged: list[Example] = []
    for example in examples:
        if merged and merged[-1].prompt_ids == example.prompt_ids:
            before = merged.pop()
            example = replace(
                before,
                completions=[*before.completions, *example.completions],
                ended=[*before.ended, *example.ended],
            )
        merged.append(example)
    return merged


def _assign_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit, longest first: rows of segment numbers, none longer than `capacity`."""
    rows: list[list[int]] = []
    room: list[int] = []
    shortest = min(lengths)
    open_rows: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in open_rows:
            if room[row] >= lengths[index]:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
            open_rows.append(row)
        rows[row].append(index)
        room[row] -= lengths[index]
        if room[row] < shortest:
            open_rows.remove(row)
    return rows


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices: best fit, longest first; a row has at most `capacity` tokens, or one longer entry."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), by room
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(open_rows, (lengths[index], -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > lengths[index]:
            insort(open_rows, (room - lengths[index], row))
    return rows


def pack(
    examples: Sequence[Example],
    *,
    layout: Layout = "trees",
    row_length: int | None = None,
    flat_from: int = FLAT_FROM,
) -> PackedBatch:
    """Pack examples into rows.

    Args:
        examples: each with a prompt of at least one token and at least one completion of at least one token.
        row_length: positions per row in the layout "trees"; None, or less than the longest tree: the longest tree.
        flat_from: with "flat", batches whose longest tree has fewer tokens get the layout "trees".
    """
    if layout == "flat" and max(map(tree_length, examples)) < flat_from:
        layout = "trees"
    # A segment is a contiguous part of a row: (example, its completions).
    segments: list[tuple[int, list[int]]] = []
    for index, example in enumerate(examples):
        if not example.prompt_ids or not example.completions or not all(example.completions):
            raise ValueError(f"{example.where}: a packed example needs a prompt and completions that are not empty")
        branches = list(range(len(example.completions)))
        segments.extend([(index, [branch]) for branch in branches] if layout == "rows" else [(index, branches)])
    lengths = [
        len(examples[index].prompt_ids) + sum(len(examples[index].completions[k]) for k in branches)
        for index, branches in segments
    ]
    if layout == "flat":
        width, rows = sum(lengths), [list(range(len(segments)))]
    else:
        width = max(max(lengths), row_length or 0)
        rows = _assign_rows(lengths, width) if layout == "trees" else [[number] for number in range(len(segments))]
    first_completion = [0, *accumulate(len(example.completions) for example in examples)]
    total = first_completion[-1]
    spans: list[tuple[int, int, int]] = [(0, 0, 0)] * total  # flat start, length, flat position before it
    ids_rows, position_rows, tree_rows, branch_rows = [], [], [], []
    padding_total = 0
    for row, members in enumerate(rows):
        ids: list[int] = []
        positions: list[int] = []
        trees: list[int] = []
        branch_of: list[int] = []
        for tree, number in enumerate(members):
            index, branches = segments[number]
            example = examples[index]
            prompt = len(example.prompt_ids)
            ids += example.prompt_ids
            positions += range(prompt)
            branch_of += [0] * prompt
            ahead = row * width + len(ids) - 1
            for k in branches:
                completion = example.completions[k]
                spans[first_completion[index] + k] = (row * width + len(ids), len(completion), ahead)
                ids += completion
                positions += range(prompt, prompt + len(completion))
                branch_of += [k + 1] * len(completion)
            trees += [tree] * (len(ids) - len(trees))
        padding = width - len(ids)
        padding_total += padding
        ids_rows.append(ids + [FILLER] * padding)
        position_rows.append(positions + [0] * padding)
        tree_rows.append(trees + [-1] * padding)
        branch_rows.append(branch_of + [0] * padding)

    span = torch.tensor(spans, dtype=torch.long).view(-1, 3)
    start, count, before = span.unbind(1)
    completion_index = torch.repeat_interleave(torch.arange(total), count)
    offset = torch.arange(int(count.sum())) - torch.repeat_interleave(count.cumsum(0) - count, count)
    token_index = start[completion_index] + offset
    predict_index = torch.where(offset == 0, before[completion_index], token_index - 1)
    if any(example.trained is not None for example in examples):
        flags = [flag for e in examples for flag in e.trained or [True] * sum(map(len, e.completions))]
        read = torch.tensor(flags).nonzero().squeeze(1)
        completion_index, offset, token_index, predict_index = (
            index[read] for index in (completion_index, offset, token_index, predict_index)
        )
    input_ids = torch.tensor(ids_rows, dtype=torch.long)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.tensor(position_rows, dtype=torch.long),
        tree=torch.tensor(tree_rows, dtype=torch.long),
        branch=torch.tensor(branch_rows, dtype=torch.long),
        predict_index=predict_index,
        token_index=token_index,
        target_ids=input_ids.view(-1).index_select(0, token_index),
        completion_index=completion_index,
        offset=offset,
        lengths=count,
        last_index=start + count - 1,
        layout=layout,
        active_tokens=sum(lengths),
        context_tokens=sum(position + 1 for row in position_rows for position in row) - padding_total,
        num_prompts=len(segments),
        trees=tuple((len(e.prompt_ids), tuple(map(len, e.completions))) for e in examples) if layout == "flat" else (),
    )
