"""Best-of-n against all subsets and all tuples, written out."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest

from rlhf_pipeline.evaluation.best_of_n import ChooserLaw, best_of_n, kl_bound


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


def all_tuples(chooser: np.ndarray, judged: np.ndarray, probability: np.ndarray, n: int) -> tuple[float, float]:
    """Judged figure and KL of best-of-n, by going through every tuple of n responses; of several best ones the first
    drawn is taken, which falls on each in proportion to the reference."""
    chosen = np.zeros(len(probability))
    for drawn in product(range(len(probability)), repeat=n):
        best = max(drawn, key=lambda i: chooser[i])  # the first of equal ones
        chosen[best] += math.prod(probability[i] for i in drawn)
    assert chosen.sum() == pytest.approx(1.0)
    used = chosen > 0
    return float(chosen @ judged), float(np.sum(chosen[used] * np.log(chosen[used] / probability[used])))


def tree_of_responses() -> tuple[np.ndarray, np.ndarray]:
    """Reference probabilities of a tree: at each of up to three steps stop, a or b. 7 ended responses and 8 cut ones;
    and for each response the number of a's, a chooser with many ties."""
    draw = np.random.default_rng(7)
    probability, count = [], []

    def walk(mass: float, depth: int, a: int) -> None:
        if depth == 3:
            probability.append(mass)
            count.append(float(a))
            return
        stop, left, right = draw.dirichlet([1.0, 1.0, 1.0])
        probability.append(mass * stop)
        count.append(float(a))
        walk(mass * left, depth + 1, a + 1)
        walk(mass * right, depth + 1, a)

    walk(1.0, 0, 0)
    return np.array(probability), np.array(count)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("ties", [True, False])
def test_exact_best_of_n_on_a_tree(n, ties):
    probability, count = tree_of_responses()
    assert len(probability) == 15
    draw = np.random.default_rng(8)
    chooser = count if ties else draw.normal(size=15)
    judged = draw.normal(size=15)
    found = ChooserLaw.of(chooser, judged, np.log(probability)).best_of(n)
    assert found == pytest.approx(all_tuples(chooser, judged, probability, n), abs=1e-10)


def test_exact_best_of_n_is_what_the_estimator_estimates():
    probability, count = tree_of_responses()
    draw = np.random.default_rng(9)
    judged = draw.normal(size=15)
    rows = draw.choice(15, size=(4000, 16), p=probability)
    law = ChooserLaw.of(count, judged, np.log(probability))
    for n in (2, 8):
        sampled = best_of_n(count[rows], judged[rows], n)
        assert abs(sampled.mean() - law.best_of(n)[0]) < 4 * sampled.std() / math.sqrt(4000)


def test_best_of_very_many_is_the_best_and_its_kl_the_log_of_its_mass():
    law = ChooserLaw.of([1.0, 2.0, 3.0, 3.0], [0.0, 0.0, 4.0, 8.0], np.log([0.5, 0.499999, 0.75e-6, 0.25e-6]))
    value, kl = law.best_of(10**9)
    assert value == pytest.approx(5.0, abs=1e-9)
    assert kl == pytest.approx(math.log(1e6), abs=1e-6)
    assert kl < kl_bound(10**9)
    # A mass of 1e-12 below all others and one above: differences of numbers near 1 keep their digits.
    law = ChooserLaw.of([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], np.log([1e-12, 1 - 2e-12, 1e-12]))
    assert law.best_of(5)[0] == pytest.approx(5e-12, rel=1e-6)
    assert law.best_of(1)[1] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.filterwarnings("error")
def test_responses_that_the_reference_never_gives():
    with np.errstate(divide="ignore"):
        logs = np.log([0.0, 0.5, 0.5])
    value, kl = ChooserLaw.of([9.0, 1.0, 2.0], [99.0, 0.0, 1.0], logs).best_of(2)
    assert value == pytest.approx(0.75)
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-12)


def test_exact_best_of_n_refuses_what_is_no_distribution():
    with pytest.raises(ValueError, match="expected equal shapes and 1"):
        ChooserLaw.of([1.0, 2.0], [1.0, 2.0], np.log([0.5, 0.4]))
    with pytest.raises(ValueError, match="at least 1"):
        ChooserLaw.of([1.0], [1.0], [0.0]).best_of(0)
