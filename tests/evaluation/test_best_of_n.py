"""Best-of-n against all subsets, written out."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.best_of_n import best_of_n, kl_bound


def brute_force(chooser: np.ndarray, judged: np.ndarray, n: int) -> float:
    """Mean over all n-subsets of the judged figure of the chooser's favourites, ties shared among all subsets."""
    total = 0.0
    subsets = list(combinations(range(len(chooser)), n))
    for subset in subsets:
        top = max(chooser[i] for i in subset)
        winners = [i for i in subset if chooser[i] == top]
        total += sum(judged[i] for i in winners) / len(winners)
    return total / len(subsets)


@pytest.mark.parametrize("n", range(1, 8))
def test_equals_the_mean_over_all_subsets(n):
    draw = np.random.default_rng(0)
    chooser, judged = draw.normal(size=(3, 7)), draw.normal(size=(3, 7))
    expected = [brute_force(a, b, n) for a, b in zip(chooser, judged)]
    assert best_of_n(chooser, judged, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", range(1, 8))
def test_ties_share_their_weight(n):
    draw = np.random.default_rng(1)
    chooser, judged = draw.integers(0, 3, (4, 7)).astype(float), draw.normal(size=(4, 7))
    expected = [brute_force(a, b, n) for a, b in zip(chooser, judged)]
    assert best_of_n(chooser, judged, n) == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    scores = np.array([[3.0, 1.0, 2.0]])
    assert best_of_n(scores, scores, 1).tolist() == pytest.approx([2.0])
    assert best_of_n(scores, scores, 2).tolist() == pytest.approx([8 / 3])  # {3,1} {3,2} {1,2}: 3, 3, 2
    assert best_of_n(scores, scores, 3).tolist() == pytest.approx([3.0])
    assert best_of_n(scores, -scores, 3).tolist() == pytest.approx([-3.0])


def test_a_chooser_that_knows_nothing_gains_nothing():
    judged = np.random.default_rng(2).normal(size=(2, 9))
    for n in (1, 4, 9):
        assert best_of_n(np.zeros((2, 9)), judged, n) == pytest.approx(judged.mean(1), abs=1e-12)


def test_many_samples_stay_exact():
    total, n = 1000, 64
    found = best_of_n(np.arange(total)[None].astype(float), np.arange(1, total + 1)[None].astype(float), n)
    assert found[0] == pytest.approx(n * (total + 1) / (n + 1), rel=1e-10)  # mean of the maximum of n of N ranks


@pytest.mark.parametrize("n", [0, -1, 4])
def test_n_outside_the_samples_is_refused(n):
    with pytest.raises(ValueError, match="found 3"):
        best_of_n(np.zeros((1, 3)), np.zeros((1, 3)), n)


def test_the_kl_bound():
    assert kl_bound(1) == 0.0
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    assert kl_bound(64) == pytest.approx(3.17451, abs=1e-5)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_bound_is_a_bound(n):
    # Exact best-of-n of a distribution with ten distinct rewards: P(best <= v) = F(v)^n.
    p = np.random.default_rng(3).dirichlet(np.ones(10))
    below = np.concatenate([[0.0], np.cumsum(p)])
    best = np.diff(below**n)
    kl = float(np.sum(best[best > 0] * np.log(best[best > 0] / p[best > 0])))
    assert 0 < kl <= kl_bound(n) + 1e-12
