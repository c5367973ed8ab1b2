"""Untied pairs of rankings, and index vectors over a batch."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.data.comparisons import Comparisons, compare
from rlhf_pipeline.data.tokenize import Example


def example(*completions: list[int], ranks: tuple[int, ...] | None = None) -> Example:
    return Example([1], list(completions), [True] * len(completions), "key", "f:1", ranks=ranks)


PAIR = example([2], [3])
RANKING = example([2], [3], [4, 5], [6], ranks=(1, 2, 2, 3))
DOUBLE = example([2], [3], [2], ranks=(1, 2, 3))


@pytest.mark.parametrize(
    ("found", "pairs"),
    [
        (PAIR, [(0, 1)]),
        (example([2]), []),
        (example([2], [3], [4]), [(0, 1), (0, 2), (1, 2)]),
        (RANKING, [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]),
        (example([2], [3], [4], ranks=(3, 1, 2)), [(1, 0), (2, 0), (1, 2)]),
        (DOUBLE, [(0, 1), (1, 2)]),  # the first and the last are one response
        (example([2], [3], ranks=(1, 1)), []),
    ],
)
def test_untied_pairs_by_hand(found, pairs):
    assert found.untied() == pairs


def test_the_index_vectors_of_a_batch_by_hand():
    made = Comparisons.of([RANKING, PAIR, DOUBLE])
    pairs = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (4, 5), (6, 7), (7, 8)]
    assert list(zip(made.better.tolist(), made.worse.tolist())) == pairs
    assert made.siblings.tolist() == [5] * 5 + [1] + [2] * 2
    weight = made.weight(torch.zeros((), dtype=torch.float64))
    assert weight.dtype == torch.float64 and weight.tolist() == [1 / 5] * 5 + [1.0] + [0.5] * 2
    assert (made.row.tolist(), made.place.tolist()) == ([0] * 4 + [1] * 2 + [2] * 3, [0, 1, 2, 3, 0, 1, 0, 1, 2])
    assert made.shape == (3, 4)


def test_completions_as_rows_and_back():
    made = Comparisons.of([RANKING, PAIR, DOUBLE])
    values = torch.arange(1.0, 10.0)
    rows = made.spread(values)
    assert rows.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]]
    assert made.mask().tolist() == [[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]]
    assert torch.equal(made.gather(rows), values)
    wider = torch.cat([rows, torch.full((3, 2), torch.nan)], 1)  # of a data set with longer rankings elsewhere
    assert torch.equal(made.gather(wider), values)


def test_a_batch_of_pairs_or_single_completions_needs_none():
    assert compare([PAIR, PAIR]) is None and compare([example([2])]) is None
    assert torch.equal(compare([PAIR, RANKING]).better, Comparisons.of([PAIR, RANKING]).better)
