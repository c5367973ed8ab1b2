"""The reliability of labelers against closed forms, exact expectations and simulation."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy.integrate import quad

from rlhf_pipeline.labelling.pairs import pairs_of
from rlhf_pipeline.labelling.reliability import (
    DOUBT,
    fit,
    identified,
    log_likelihoods,
    maximise,
    objective,
    right_share,
    right_slope,
    strengths,
)
from tests.labelling.worlds import crowd, item, judgement, skipped

TWO = [item(n, "a", "b") for n in range(8)]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def normal(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def integral(function) -> float:
    """E function(z) of a standard normal z, by adaptive quadrature on each side of 0."""
    return sum(quad(lambda z: function(z) * normal(z), *ends, epsabs=1e-13, limit=200)[0] for ends in ((-9, 0), (0, 9)))


@pytest.mark.parametrize("a", [0.0, 0.7, 3.0, 25.0, -2.0])
def test_the_share_of_right_labels(a):
    assert right_share(a) == pytest.approx(integral(lambda z: sigma(a * abs(z))), abs=1e-9)
    step = 1e-5
    assert right_slope(a) == pytest.approx((right_share(a + step) - right_share(a - step)) / (2 * step), abs=1e-8)


def test_limits_of_the_share_of_right_labels():
    assert right_share(0.0) == pytest.approx(0.5, abs=1e-12)
    assert right_share(1.3) + right_share(-1.3) == pytest.approx(1.0, abs=1e-12)
    # Of large a the wrong labels are those of z near 0: 2 phi(0) ln 2 / a.
    assert 1 - right_share(60.0) == pytest.approx(2 * normal(0) * math.log(2) / 60, rel=1e-3)


def wins_of(*said: float | None) -> list[tuple[float, float]]:
    """One pair of responses: 1, 0 or .5 by each labeler, None where the labeler did not compare it."""
    return [(0.0, 0.0) if won is None else (won, 1 - won) for won in said]


def test_the_likelihood_of_a_pair_by_quadrature():
    a = np.array([0.8, 2.5, 1.1, -0.4])
    wins = np.array([wins_of(1, 0, None, 1), wins_of(0.5, 1, 0, None)])
    found, scores = log_likelihoods(a, wins)
    assert found[0] == pytest.approx(
        math.log(integral(lambda z: sigma(0.8 * z) * sigma(-2.5 * z) * sigma(-0.4 * z))), abs=1e-9
    )
    tie = integral(lambda z: math.sqrt(sigma(0.8 * z) * sigma(-0.8 * z)) * sigma(2.5 * z) * sigma(-1.1 * z))
    assert found[1] == pytest.approx(math.log(tie), abs=1e-9)
    for j in range(4):
        move = 1e-5 * np.eye(4)[j]
        slope = (log_likelihoods(a + move, wins)[0] - log_likelihoods(a - move, wins)[0]) / 2e-5
        assert scores[:, j] == pytest.approx(slope, abs=1e-7)


def test_the_slope_of_the_objective():
    a, counts = np.array([0.8, 2.5, 0.1]), np.array([3.0, 5.0])
    wins = np.array([wins_of(1, 0, 1), wins_of(0.5, 1, None)])
    for j in range(3):
        move = 1e-5 * np.eye(3)[j]
        slope = (objective(a + move, wins, counts)[0] - objective(a - move, wins, counts)[0]) / 2e-5
        assert objective(a, wins, counts)[1][j] == pytest.approx(slope, abs=1e-6)
    p = [right_share(one) for one in a]
    penalty = DOUBT * sum(math.log(one * (1 - one)) for one in p)
    assert objective(a, wins, counts)[0] == pytest.approx(counts @ log_likelihoods(a, wins)[0] + penalty, abs=1e-9)


def test_exact_expectations_give_the_reliabilities_back():
    """Every outcome of four labelers with its exact probability, by adaptive quadrature: the maximum is the truth."""
    true = np.array([0.6, 1.0, 1.8, 3.0])
    outcomes = list(product((0.0, 1.0), repeat=4))
    shares = [
        integral(lambda z, won=won: math.prod(sigma((2 * x - 1) * a * z) for x, a in zip(won, true)))
        for won in outcomes
    ]
    assert sum(shares) == pytest.approx(1, abs=1e-10)
    wins = np.array([wins_of(*won) for won in outcomes])
    found = maximise(wins, 1e7 * np.array(shares))  # so many that the half label of doubt weighs nothing
    assert found == pytest.approx(true, abs=2e-4)


def test_three_labelers_who_agree_alike_are_alike_reliable():
    """Each of three labelers is alone against the two others in one of 8 items: by symmetry all a are the same, 1."""
    items = [item(n, "a", "b") for n in range(80)]
    said = [judgement(j, n, [2, 1] if n % 8 == j else [1, 2]) for n in range(80) for j in range(3)]
    found = fit(pairs_of(items, said, ties=True))
    assert found.labelers == [0, 1, 2] and found.clusters == found.pairs == 80
    for j in range(3):
        assert found.reliability(j).mean == pytest.approx(1.0, abs=1e-5)
        assert found.right(j).mean == pytest.approx(found.right(0).mean, abs=1e-6)
        assert found.right(j).low < found.right(j).mean < found.right(j).high < 1


def test_mean_log_reliability_is_zero():
    items, said = crowd(np.random.default_rng(1), [0.7, 1.5, 2.0], items=60)
    found = fit(pairs_of(items, said, ties=True))
    values = [found.reliability(j) for j in range(3)]
    assert sum(math.log(one.mean) for one in values) == pytest.approx(0.0, abs=1e-9)
    assert [one.mean for one in values] == pytest.approx(found.raw / found.raw.prod() ** (1 / 3), abs=1e-9)
    for one in values:  # symmetric in the log
        assert one.mean / one.low == pytest.approx(one.high / one.mean, abs=1e-9)


def test_the_error_of_a_reliability_is_the_sandwich_by_hand():
    """Clustered scores and curvature, both by differences of the likelihood of single pairs."""
    items, said = crowd(np.random.default_rng(2), [0.8, 1.2, 2.0], items=40, size=3)
    found = fit(pairs_of(items, said, ties=True))
    by_item = []
    for number in range(40):
        rows = []
        for i, k in combinations(range(3), 2):
            ranks = [one.ranks for one in said if one.item == number]
            rows.append(wins_of(*(float(own[i] < own[k]) for own in ranks)))
        by_item.append(np.array(rows))

    def scores(a: np.ndarray) -> np.ndarray:
        return np.array([log_likelihoods(a, rows)[1].sum(0) for rows in by_item])

    def penalty(a: np.ndarray) -> np.ndarray:
        p = np.array([right_share(one) for one in a])
        return DOUBT * np.array([right_slope(one) for one in a]) * (1 - 2 * p) / (p * (1 - p))

    step = 1e-4 * np.eye(3)
    curvature = np.array(
        [
            (
                scores(found.raw - e).sum(0)
                + penalty(found.raw - e)
                - scores(found.raw + e).sum(0)
                - penalty(found.raw + e)
            )
            / 2e-4
            for e in step
        ]
    )
    assert scores(found.raw).sum(0) + penalty(found.raw) == pytest.approx(np.zeros(3), abs=1e-4)
    own = scores(found.raw)
    inverse = np.linalg.inv(curvature)
    assert found.covariance == pytest.approx(40 / 39 * inverse @ own.T @ own @ inverse, rel=1e-4)
    # The interval of the share of right labels is symmetric in asinh a, with Student's t of 39 degrees (tables).
    a, error = found.raw[0], math.sqrt(found.covariance[0, 0])
    end = math.sinh(math.asinh(a) + 2.022691 * error / math.sqrt(1 + a * a))
    assert found.right(0).high == pytest.approx(right_share(end), abs=1e-6)


def test_who_can_be_told_apart():
    assert identified([(1, 2)]) == set()  # two labelers: either may be right
    assert identified([(1, 2), (2, 3), (3, 4)]) == set()  # a chain
    assert identified([(1, 2), (2, 3), (3, 4), (4, 1)]) == set()  # a circle of four
    assert identified([(1, 2), (2, 3), (1, 3)]) == {1, 2, 3}
    assert identified([(1, 2), (2, 3), (1, 3), (3, 4), (4, 9), (5, 6)]) == {1, 2, 3, 4, 9}
    assert identified([]) == set()


def test_without_three_who_met_there_is_no_reliability():
    said = [judgement(j, n, [1, 2]) for n in range(4) for j in (1, 2)]
    assert fit(pairs_of(TWO, said, ties=True)) is None
    assert fit([]) is None
    repeats = [judgement(3, n, [1, 2], repeat=1) for n in range(4)]  # a repeat alone is no first sight
    assert fit(pairs_of(TWO, [*said, *repeats, skipped(3, 0)], ties=True)) is None


def test_full_agreement_has_a_finite_reliability_and_one_item_no_interval():
    said = [judgement(j, n, [1, 2]) for n in range(8) for j in range(3)]
    found = fit(pairs_of(TWO, said, ties=True))
    right = found.right(1)
    assert 0.8 < right.mean < 1 and right.low < right.mean
    one = fit(pairs_of(TWO, [judgement(j, 0, [1, 2]) for j in range(3)], ties=True))
    assert (one.right(0).low, one.right(0).high) == pytest.approx((0, 1), abs=1e-12)
    assert one.reliability(0) is None  # nobody is surely better than a coin


def test_a_labeler_who_reads_the_ranks_upside_down():
    items, said = crowd(np.random.default_rng(5), [2.0, 2.0, 2.0, -2.0], items=60)
    found = fit(pairs_of(items, said, ties=True))
    assert found.right(3).high < 0.5 < found.right(0).low
    assert found.reliability(3) is None  # no log
    assert math.prod(found.reliability(j).mean for j in range(3)) == pytest.approx(1, abs=1e-9)


def test_a_labeler_who_guesses_does_not_move_the_unit():
    """The mean log is taken over labelers who are surely better than a coin."""
    items, said = crowd(np.random.default_rng(0), [0.1, 1.5, 1.5, 1.5], items=60)
    found = fit(pairs_of(items, said, ties=True))
    assert found.raw[0] > 0 and found.right(0).low < 0.5
    assert math.prod(found.reliability(j).mean for j in (1, 2, 3)) == pytest.approx(1, abs=1e-9)
    middle = math.prod(found.raw[1:]) ** (1 / 3)
    assert found.reliability(0).mean == pytest.approx(found.raw[0] / middle, abs=1e-9)
    # By hand: the error of log(a_0 / middle), with the slopes 1 / a_0 and -1 / (3 a_j).
    slope = np.array([1, -1 / 3, -1 / 3, -1 / 3]) / found.raw
    half = 2.000995 * math.sqrt(slope @ found.covariance @ slope)  # Student t, 59 degrees, from tables
    assert math.log(found.reliability(0).high / found.reliability(0).mean) == pytest.approx(half, rel=1e-6)


def test_strengths_of_one_pair_by_hand():
    # a sigma(-a d) = d for d = s_0 - s_1, of one label of a labeler with a = 2.
    d = strengths(pairs_of(TWO, [judgement(5, 0, [1, 2])], ties=True), {0: 2}, {5: 2.0})[0]
    assert d[0] == -d[1] and 2 * sigma(-2 * (d[0] - d[1])) == pytest.approx(d[0] - d[1], abs=1e-9)
    tie = strengths(pairs_of(TWO, [judgement(5, 0, [1, 1])], ties=True), {0: 2}, {5: 2.0})[0]
    assert tie == pytest.approx([0, 0], abs=1e-12)


def test_a_reliable_labeler_outweighs_two_others():
    said = [judgement(1, 0, [1, 2]), judgement(2, 0, [2, 1]), judgement(3, 0, [2, 1])]
    pairs = pairs_of(TWO, said, ties=True)
    assert strengths(pairs, {0: 2}, {1: 3.0, 2: 0.5, 3: 0.5})[0][0] > 0
    assert strengths(pairs, {0: 2}, {1: 1.0, 2: 1.0, 3: 1.0})[0][0] < 0


def test_strengths_are_those_of_bradley_terry_with_the_normal_law_as_a_slope():
    """With all a = 1: won_i - sum_k played_ik sigma(s_i - s_k) = 2 s_i, the score equations with their penalty."""
    items = [item(0, "a", "b", "c")]
    said = [judgement(1, 0, [1, 2, 3]), judgement(2, 0, [2, 1, 3]), judgement(3, 0, [1, 1, 2])]
    s = strengths(pairs_of(items, said, ties=True), {0: 3}, dict.fromkeys((1, 2, 3), 1.0))[0]
    wins = np.array([[0, 1.5, 3], [1.5, 0, 3], [0, 0, 0]])
    for i in range(3):
        expected = sum((wins[i, k] + wins[k, i]) * sigma(s[i] - s[k]) for k in range(3) if k != i)
        assert wins[i].sum() - expected == pytest.approx(2 * s[i], abs=1e-9)
    assert s[0] == pytest.approx(s[1], abs=1e-12) and sum(s) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.check
@pytest.mark.parametrize(
    ("reliabilities", "items", "least"),
    [((0.0, 1.5, 1.5, 1.5), 60, 0.9), ((0.7, 1.0, 1.4, 2.0), 60, 0.9), ((0.5, 1.0, 2.0), 150, 0.85)],
)
def test_intervals_cover_the_truth(reliabilities, items, least):
    """150 crowds who rank four responses; a standard error of the coverage is 1.8 points.

    With three labelers, one of whom nearly guesses, the reliability of the best rests on the small agreement of the
    other two: its law is wide and skewed, and the interval covers about 90 %.
    """
    covered, logs, known = np.zeros((3, len(reliabilities)))
    for seed in range(150):
        found = fit(pairs_of(*crowd(np.random.default_rng(seed), reliabilities, items=items), ties=True))
        sure = [a for j, a in enumerate(reliabilities) if found.right(j).low > 0.5]
        for j, a in enumerate(reliabilities):
            right, ratio = found.right(j), found.reliability(j)
            covered[j] += right.low <= right_share(a) <= right.high
            if a > 0 and ratio is not None and all(sure):
                known[j] += 1
                logs[j] += ratio.low <= a / math.prod(sure) ** (1 / len(sure)) <= ratio.high
    assert (covered / 150 >= least).all(), covered / 150
    assert (logs >= least * known).all(), logs / known


@pytest.mark.slow
@pytest.mark.check
def test_the_strengths_agree_with_the_truth_more_than_a_majority_of_unequal_labelers():
    """Three guess and one knows: adjusted strengths order pairs right more often than plain Bradley-Terry."""
    draw = np.random.default_rng(0)
    true, items, said = [], [], []
    for n in range(300):
        s = draw.normal(scale=0.5**0.5, size=2)
        true.append(s[0] > s[1])
        items.append(item(n, "a", "b"))
        for j, a in enumerate((0.2, 0.2, 0.2, 5.0)):
            said.append(judgement(j, n, [1, 2] if draw.random() < sigma(a * (s[0] - s[1])) else [2, 1]))
    pairs = pairs_of(items, said, ties=True)
    found = fit(pairs)
    adjusted = strengths(pairs, dict.fromkeys(range(300), 2), dict(zip(found.labelers, found.raw, strict=True)))
    plain = strengths(pairs, dict.fromkeys(range(300), 2), {})
    right = [sum((own[n][0] > own[n][1]) == true[n] for n in range(300)) / 300 for own in (adjusted, plain)]
    assert right[0] > 0.8 > 0.75 > right[1]
