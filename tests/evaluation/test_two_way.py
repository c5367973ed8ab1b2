"""Intervals clustered by prompt and labeler: by hand, as one-way intervals, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.evaluation.elo import rank
from rlhf_pipeline.evaluation.statistics import cluster_mean, clustered
from rlhf_pipeline.evaluation.two_way import SHARE_OVER_BOTH, Judged, two_way_share

T_1, T_2 = 12.706205, 4.302653  # Student t, 97.5 %, from tables


def test_the_variance_by_hand():
    """Two prompts, two labelers: sums 4 and 0 by prompt, 5 and -1 by labeler, four cells."""
    judged = Judged.by(["p", "p", "q", "q"], [1, 2, 1, 2])
    found = judged.variance(np.array([3.0, 1.0, 2.0, -2.0]))
    assert found == pytest.approx(2 * (16 + 0) + 2 * (25 + 1) - 4 / 3 * (9 + 1 + 4 + 4))  # 60
    assert (judged.clusters, judged.quantile) == (2, pytest.approx(T_1, abs=1e-5))


def test_the_variance_is_never_below_that_of_one_way():
    """Sums 3 and -1 by prompt, 4 and -2 by labeler: 20 + 40 - 40 = 20 is less than the 40 of labelers alone."""
    found = Judged.by(["p", "p", "q", "q"], [1, 2, 1, 2]).variance(np.array([1.0, 2.0, 3.0, -4.0]))
    assert found == pytest.approx(40)


def test_several_judgements_of_one_labeler_on_one_prompt_are_one_cell():
    """Cells 3 + 1, 2, -2, 5: the variance is that of a sum, pair by pair, with the corrections of the kinds."""
    prompts, labelers, psi = [0, 0, 0, 1, 2], [0, 0, 1, 0, 1], np.array([3.0, 1.0, 2.0, -2.0, 5.0])
    by_prompt, by_labeler, both = 36 + 4 + 25, 4 + 49, 16 + 4 + 4 + 25
    expected = 3 / 2 * by_prompt + 2 * by_labeler - 4 / 3 * both
    assert Judged.by(prompts, labelers).variance(psi) == pytest.approx(expected)
    columns = Judged.by(prompts, labelers).variance(np.stack([psi, 2 * psi], 1))
    assert columns == pytest.approx([expected, 4 * expected])


def test_one_labeler_is_the_interval_over_prompts():
    values, prompts = [1, 0.5, 0, 1, 1, 0, 1], [0, 0, 1, 2, 3, 3, 4]
    found, p = two_way_share(values, prompts, ["x"] * 7)
    alone, expected = clustered(values, prompts, null=0.5, share=True)
    assert (found.mean, found.low, found.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=1e-12)
    assert (found.n, found.clusters, found.method) == (7, 5, "wilson")
    assert p == pytest.approx(expected, abs=1e-12)


def test_a_share_by_hand():
    """Three prompts and three labelers, all cells: Wilson's interval with the variance of the two-way sum."""
    table = np.array([[1.0, 1.0, 0.5], [0.0, 0.5, 0.0], [1.0, 0.0, 0.5]])  # by prompt and labeler
    prompts, labelers = np.arange(3).repeat(3), np.tile(np.arange(3), 3)
    found, _ = two_way_share(table.ravel(), prompts.tolist(), labelers.tolist())
    rest = (table - 0.5) / 9
    variance = 1.5 * (rest.sum(1) ** 2).sum() + 1.5 * (rest.sum(0) ** 2).sum() - 9 / 8 * (rest**2).sum()
    variance = max(variance, 1.5 * (rest.sum(1) ** 2).sum())
    assert found.mean == pytest.approx(0.5)
    # No prompt is wholly of one side: the effective size is p (1 - p) / variance.
    square = T_2**2 / (0.25 / variance)
    half = math.sqrt(square * (0.25 + square / 4)) / (1 + square)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
    assert (found.n, found.clusters, found.method) == (9, 3, SHARE_OVER_BOTH)


def rows(outcomes: np.ndarray) -> np.ndarray:
    """(N, 2, 2) wins of two models from the outcomes of the first."""
    wins = np.zeros((len(outcomes), 2, 2))
    wins[:, 0, 1], wins[:, 1, 0] = outcomes, 1 - outcomes
    return wins


def test_elo_of_two_models_by_hand():
    """The delta method: d logit(p) = dp / (p (1 - p)), with the two-way variance of the mean."""
    draw = np.random.default_rng(0)
    prompts, labelers = np.arange(20).repeat(3), np.tile(np.arange(3), 20)
    outcomes = draw.integers(0, 3, 60) / 2
    elo = rank(rows(outcomes), baseline=1, prompts=prompts.tolist(), labelers=labelers.tolist())[0].elo
    p = outcomes.mean()
    variance = float(Judged.by(prompts.tolist(), labelers.tolist()).variance((outcomes - p) / 60))
    half = T_2 * math.sqrt(variance) / (p * (1 - p)) * 400 / math.log(10)
    assert elo.mean == pytest.approx(1000 + 400 * math.log10(p / (1 - p)), abs=1e-6)
    assert elo.high - elo.mean == pytest.approx(half, rel=1e-6)
    assert (elo.n, elo.clusters, elo.method) == (60, 3, "t over prompts and labelers")


def test_elo_of_one_labeler_is_that_of_prompts():
    outcomes = np.random.default_rng(1).integers(0, 3, 30) / 2
    alone = rank(rows(outcomes), baseline=1)
    assert rank(rows(outcomes), baseline=1, prompts=range(30), labelers=[7] * 30) == alone


def test_a_sweep_before_two_labelers_is_the_bound_of_its_prompts():
    """Agreement is no evidence on how far labelers differ: 16 prompts allow what they allow one labeler."""
    prompts, labelers = np.arange(16).repeat(2).tolist(), [0, 1] * 16
    a, b = rank(rows(np.ones(32)), baseline=1, prompts=prompts, labelers=labelers)
    low = cluster_mean(np.ones(16), range(16), share=True).low
    assert (a.bound, b.bound, a.elo.high) == ("at least", None, math.inf)
    assert a.elo.low == pytest.approx(1000 + 400 * math.log10(low / (1 - low)), abs=1e-6)
    assert two_way_share(np.ones(32), prompts, labelers)[0].low == pytest.approx(low, abs=1e-9)


def test_what_has_no_judgements_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Judged.by([])
    with pytest.raises(ValueError, match="3 prompts and 2 labelers"):
        Judged.by([1, 2, 3], [1, 2])


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
BASE = 0.7
"""The log-odds of a win for a usual prompt and a usual labeler."""


def share(by_prompt: float, by_labeler: float, at: float = BASE) -> float:
    """The mean of sigma(at + by_prompt z + by_labeler z') over independent standard normal z and z'."""
    spread = by_prompt * NODES[:, None] + by_labeler * NODES[None, :]
    return float(WEIGHTS @ (1 / (1 + np.exp(-at - spread))) @ WEIGHTS)


def judge(draw: np.random.Generator, labeler: np.ndarray, taste: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """Verdicts 0 or 1 of (P, each) labelers on P prompts."""
    return (draw.random(labeler.shape) < 1 / (1 + np.exp(-BASE - hard[:, None] - taste[labeler]))).astype(float)


SIMULATIONS, PROMPTS = 400, 60


@pytest.mark.slow
@pytest.mark.check
@pytest.mark.parametrize("effects", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("labelers, each", [(2, 2), (4, 2), (8, 2), (1, 1)])
def test_coverage(labelers, each, effects):
    """Each prompt is judged by `each` of the labelers, whose taste moves the log-odds of a win, as the prompt does.

    At most three points below 95 % (a simulation of 400 has a standard error of 1.1 points), or conservative. With one
    labeler the truth is that of this labeler.
    """
    by_prompt, by_labeler = effects
    draw = np.random.default_rng(0)
    prompt, inside, inside_elo = np.arange(PROMPTS).repeat(each).tolist(), 0, 0
    for _ in range(SIMULATIONS):
        taste, hard = by_labeler * draw.normal(size=labelers), by_prompt * draw.normal(size=PROMPTS)
        truth = share(*effects) if labelers > 1 else share(by_prompt, 0.0, BASE + float(taste[0]))
        labeler = draw.random((PROMPTS, labelers)).argsort(1)[:, :each]
        won = judge(draw, labeler, taste, hard).ravel()
        found, _ = two_way_share(won, prompt, labeler.ravel().tolist())
        inside += found.low <= truth <= found.high
        elo = rank(rows(won), baseline=1, prompts=prompt, labelers=labeler.ravel().tolist())[0].elo
        inside_elo += elo.low <= 1000 + 400 * math.log10(truth / (1 - truth)) <= elo.high
    print(f"coverage: share {inside / SIMULATIONS:.3f}, Elo {inside_elo / SIMULATIONS:.3f}")
    assert min(inside, inside_elo) / SIMULATIONS >= 0.92


@pytest.mark.slow
@pytest.mark.check
def test_clustering_by_prompt_alone_says_too_much_about_other_labelers():
    draw, inside, labeler = np.random.default_rng(0), 0, np.tile(np.arange(4), PROMPTS // 2).reshape(PROMPTS, 2)
    for _ in range(200):
        won = judge(draw, labeler, draw.normal(size=4), np.zeros(PROMPTS)).ravel()
        found = cluster_mean(won, np.arange(PROMPTS).repeat(2).tolist(), share=True)
        inside += found.low <= share(0.0, 1.0) <= found.high
    assert inside / 200 < 0.8
