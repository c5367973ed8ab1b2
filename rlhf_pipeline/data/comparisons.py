"""The untied pairs of rankings, as index vectors over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_pipeline.data.tokenize import Example


@dataclass(frozen=True)
class Comparisons:
    """The P untied pairs of a batch of E examples with C completions in total, at most K each.

    better, worse: (P,) indices of completions in the batch. siblings: (P,) untied pairs of the pair's example.
    row, place: (C,) example of each completion, and its index within the example.
    """

    better: Tensor
    worse: Tensor
    siblings: Tensor
    row: Tensor
    place: Tensor
    shape: tuple[int, int]  # (E, K)

    @staticmethod
    def of(examples: Sequence[Example]) -> Comparisons:
        """Return the comparisons of examples; completions are numbered in order."""
        sizes = [len(example.completions) for example in examples]
        rows: list[tuple[int, int, int]] = []
        first = 0
        for example, size in zip(examples, sizes, strict=True):
            pairs = example.untied()
            rows += [(first + i, first + j, len(pairs)) for i, j in pairs]
            first += size
        better, worse, siblings = torch.tensor(rows, dtype=torch.long).view(-1, 3).unbind(1)
        count = torch.tensor(sizes, dtype=torch.long)
        row = torch.repeat_interleave(torch.arange(len(sizes)), count)
        place = torch.arange(first) - (count.cumsum(0) - count)[row]
        return Comparisons(better, worse, siblings, row, place, (len(sizes), max(sizes)))

    def to(self, device: torch.device | str) -> Comparisons:
        """Return the comparisons on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if name != "shape"})

    def weight(self, like: Tensor) -> Tensor:
        """Return (P,) weights 1 / untied pairs of the example: every example counts once; dtype of `like`."""
        return self.siblings.to(like).reciprocal()

    def spread(self, values: Tensor) -> Tensor:
        """Arrange completion values (C,) as (E, K), padded with zeros."""
        rows, width = self.shape
        return values.new_zeros(rows * width).index_copy(0, self.row * width + self.place, values).view(rows, width)

    def mask(self) -> Tensor:
        """Return an (E, K) bool mask, true for completions."""
        return self.spread(torch.ones_like(self.row)).bool()

    def gather(self, values: Tensor) -> Tensor:
        """Return the completions' values (C,) from a matrix (E, K or more)."""
        return values.reshape(-1).index_select(0, self.row * values.shape[1] + self.place)


def compare(examples: Sequence[Example], device: torch.device | str = "cpu") -> Comparisons | None:
    """Return the comparisons of a batch with rankings.

    None if every example has at most two completions: chosen and rejected then alternate.
    """
    if all(len(example.completions) <= 2 for example in examples):
        return None
    return Comparisons.of(examples).to(device)
