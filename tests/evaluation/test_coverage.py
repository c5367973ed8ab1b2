"""What the intervals and p-values promise, by simulation from laws whose means are known.

Nominal is 95 %. A simulation of 2,000 has a standard error of half a point, one of 500 a point; an interval passes
within two points of nominal (three at 500), or above where its docstring calls it conservative.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from rlhf_pipeline.evaluation.elo import rank
from rlhf_pipeline.evaluation.frontier import Curve, area_between, difference_at
from rlhf_pipeline.evaluation.seeds import Inference, contrast, infer, over_prompts, over_seeds, over_seeds_and_prompts
from rlhf_pipeline.evaluation.statistics import Estimate, cluster_mean
from rlhf_pipeline.evaluation.win_rates import length_controlled_win_rate, win_rate
from tests.evaluation.shares import covers, drawn

pytestmark = [pytest.mark.slow, pytest.mark.check]

MANY, FEW = 2000, 500
RESAMPLES = 400  # where every simulation has its own bootstrap


def coverage(count: int, once: Callable[[np.random.Generator], Estimate], truth: float, seed: int = 0) -> float:
    draw = np.random.default_rng(seed)
    found = (once(draw) for _ in range(count))
    return sum(one.low <= truth <= one.high for one in found) / count


def crossed(draw: np.random.Generator, seeds: int, prompts: int, parts: tuple[float, float, float]) -> np.ndarray:
    """(S, P) around 0: an effect of the seed, of the prompt, and a rest, with these standard deviations."""
    seed, prompt, rest = parts
    return (
        seed * draw.normal(size=(seeds, 1))
        + prompt * draw.normal(size=(1, prompts))
        + rest * draw.normal(size=(seeds, prompts))
    )


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_t_over_seeds_on_these_prompts(seeds):
    prompts = np.random.default_rng(1).normal(size=(1, 8))  # the same in all simulations
    found = coverage(
        MANY, lambda draw: over_seeds(prompts + crossed(draw, seeds, 8, (1, 0, 1))).estimate, float(prompts.mean())
    )
    assert abs(found - 0.95) <= 0.02


def test_the_bootstrap_over_200_prompts_with_several_samples_each():
    clusters = np.arange(200).repeat(4).tolist()

    def once(draw: np.random.Generator) -> Estimate:
        effects = draw.exponential(size=200).repeat(4)  # skewed, as rewards are
        return cluster_mean(effects + draw.normal(size=800), clusters, resamples=RESAMPLES)

    assert abs(coverage(MANY, once, 1.0) - 0.95) <= 0.02


def test_t_over_16_prompts_with_several_samples_each():
    def once(draw: np.random.Generator) -> Estimate:
        return over_prompts((draw.normal(size=(16, 1)) + draw.normal(size=(16, 4))).mean(1)).estimate

    assert abs(coverage(MANY, once, 0.0) - 0.95) <= 0.02


@pytest.mark.parametrize("alike", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("prompts", [8, 16, 64, 256])
@pytest.mark.parametrize("samples", [4, 64])
def test_a_share_clustered_by_prompt(samples, prompts, p, alike):
    """Within two points of nominal or conservative, at any correlation within a prompt."""
    assert covers(drawn(np.random.default_rng(0), MANY, prompts, p, alike, samples), p) >= 0.93


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("p", [0.9, 0.97, 0.99])
@pytest.mark.parametrize("prompts", [8, 16, 64])
def test_a_share_over_seeds_and_prompts(prompts, p, seeds):
    """A prompt is as easy for every seed; seeds differ in nothing but their samples."""
    draw = np.random.default_rng(0)
    chance = draw.beta(p * (1 / 0.3 - 1), (1 - p) * (1 / 0.3 - 1), (MANY, 1, prompts))
    tables = draw.binomial(4, chance, (MANY, seeds, prompts)) / 4
    found = [infer(table, share=True).estimate for table in tables]
    assert sum(one.low <= p <= one.high for one in found) / MANY >= 0.93


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("prompts", [16, 64])
@pytest.mark.parametrize("parts", [(1, 1, 1), (0.2, 1, 1), (1, 0.2, 1), (0, 0, 1)], ids=str)
def test_seeds_crossed_with_prompts(seeds, prompts, parts):
    def once(draw: np.random.Generator) -> Estimate:
        return over_seeds_and_prompts(crossed(draw, seeds, prompts, parts)).estimate

    assert coverage(MANY, once, 0.0) >= 0.93


def test_t_over_seeds_alone_says_too_much_about_other_prompts():
    found = coverage(MANY, lambda draw: over_seeds(crossed(draw, 5, 16, (0.1, 1, 0.5))).estimate, 0.0)
    assert found < 0.8


KL_A, KL_B = np.array([0.5, 1.5, 3.0, 5.0]), np.array([1.0, 2.5, 4.0])
BENT_A, BENT_B = np.array([1.0, 2.0, 2.8, 3.2]), np.array([1.2, 2.1, 2.4])
AT = 2.0


def arm(draw: np.random.Generator, kl: np.ndarray, reward: np.ndarray, ability: np.ndarray, seeds: int) -> Curve:
    """An arm whose points lie at (kl, reward) on average over prompts.

    Prompts differ in the reward they give (`ability`, the same for all arms) and in how far KL goes on them, which
    moves the reward too. With several seeds, seeds differ in their reward and in how far along a line of slope 1/2 they
    went: their curves are then parallel where `reward` is linear in `kl`.
    """
    spread = 0.1 if seeds > 1 else 0.0
    far = kl[:, None] * np.exp(spread * draw.normal(size=(seeds, 1, 1)))
    stray = 0.3 * far * draw.normal(size=(seeds, len(kl), len(ability)))
    better = spread * draw.normal(size=(seeds, 1, 1))
    noise = 0.5 * draw.normal(size=stray.shape)
    return Curve.of(far + stray, reward[:, None] + (far - kl[:, None]) / 2 + 0.4 * stray + better + ability + noise)


def mean_gap(low: float, high: float) -> float:
    grid = np.linspace(low, high, 100_001)
    return float((np.interp(grid, KL_A, BENT_A) - np.interp(grid, KL_B, BENT_B)).mean())


@pytest.mark.parametrize("prompts", [16, 100])
@pytest.mark.parametrize("read", ["at", "area"])
def test_matched_kl_of_one_seed(prompts, read):
    truth = 2 + 0.8 / 3 - (1.2 + 0.6) if read == "at" else mean_gap(1.0, 4.0)

    def once(draw: np.random.Generator) -> Estimate:
        ability = draw.normal(size=prompts)
        a, b = arm(draw, KL_A, BENT_A, ability, 1), arm(draw, KL_B, BENT_B, ability, 1)
        found = (
            difference_at(a, b, AT, resamples=RESAMPLES) if read == "at" else area_between(a, b, resamples=RESAMPLES)
        )
        return found.inference.estimate

    assert abs(coverage(FEW, once, truth) - 0.95) <= 0.03


@pytest.mark.parametrize("seeds, prompts", [(3, 64), (5, 16)])
@pytest.mark.parametrize("read", ["at", "area"])
def test_matched_kl_over_seeds_and_prompts(seeds, prompts, read):
    def once(draw: np.random.Generator) -> Estimate:
        ability = draw.normal(size=prompts)
        a, b = arm(draw, KL_A, 0.3 + KL_A / 2, ability, seeds), arm(draw, KL_B, KL_B / 2, ability, seeds)
        found = (
            difference_at(a, b, AT, resamples=RESAMPLES) if read == "at" else area_between(a, b, resamples=RESAMPLES)
        )
        return found.inference.estimate

    assert coverage(FEW, once, 0.3) >= 0.92


@pytest.mark.parametrize("prompts", [16, 60])
def test_the_win_rate(prompts):
    def once(draw: np.random.Generator) -> Estimate:
        # Rewards in steps of a half, ties included; prompts differ in which side does better on them.
        mine = np.rint(2 * (draw.normal(size=(prompts, 1)) + draw.normal(size=(prompts, 4))))
        theirs = np.rint(2 * (draw.normal(size=(prompts, 1)) + draw.normal(size=(prompts, 4))))
        return win_rate(mine, theirs, coupled=False).estimate

    assert -0.02 <= coverage(MANY, once, 0.5) - 0.95 <= 0.03


@pytest.mark.parametrize("prompts", [16, 100])
def test_the_length_controlled_win_rate(prompts):
    def once(draw: np.random.Generator) -> Estimate:
        gap = np.rint(draw.normal(3.0, 8.0, (prompts, 4)))
        lean = 0.5 * draw.normal(size=(prompts, 1)) + 1.5 * np.tanh(gap / 8.0)
        won = draw.random((prompts, 4)) < 1 / (1 + np.exp(-lean))
        return length_controlled_win_rate(
            np.where(won, 1.0, -1.0),
            np.zeros((prompts, 1)),
            gap,
            np.zeros((prompts, 1)),
            coupled=False,
            resamples=RESAMPLES,
        ).inference.estimate

    assert abs(coverage(FEW, once, 0.5) - 0.95) <= 0.03


@pytest.mark.parametrize("prompts", [20, 100])
def test_elo(prompts):
    strengths = np.array([0.6, 0.0, -0.6])
    rates = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))

    def once(draw: np.random.Generator) -> Estimate:
        upper = np.triu((draw.random((4, prompts, 3, 3)) < rates).mean(0), 1)
        wins = upper + np.triu(np.ones((3, 3)), 1).T * (1 - upper.transpose(0, 2, 1))
        return rank(wins, baseline=2)[0].elo

    assert abs(coverage(MANY, once, 1000 + 400 / math.log(10) * 1.2) - 0.95) <= 0.02


def rejections(count: int, once: Callable[[np.random.Generator], Inference], seed: int = 0) -> float:
    draw = np.random.default_rng(seed)
    found = [once(draw) for _ in range(count)]
    assert all(
        (one.p < 0.05) == (not one.estimate.low <= 0 <= one.estimate.high)
        for one in found
        if one.estimate.method.startswith("t over seeds")
    )
    return sum(one.p < 0.05 for one in found) / count


@pytest.mark.parametrize("seeds, prompts, fixed", [(1, 16, False), (3, 16, True), (5, 16, True), (1, 60, False)])
def test_two_arms_that_are_one_are_told_apart_at_the_nominal_rate(seeds, prompts, fixed):
    """A/A. With fixed prompts the arms share them and nothing about prompts is random."""
    count = FEW if prompts >= 50 else MANY

    def once(draw: np.random.Generator) -> Inference:
        shared = draw.normal(size=(1, prompts))
        parts = (0.3 if seeds > 1 else 0.0, 0.0, 0.5)
        one, other = (shared + crossed(draw, seeds, prompts, parts) for _ in range(2))
        return over_seeds(one - other) if fixed else contrast(one, other)

    assert abs(rejections(count, once) - 0.05) <= (0.03 if count == FEW else 0.02)


@pytest.mark.parametrize("seeds, prompts", [(3, 16), (5, 64)])
def test_two_arms_that_are_one_are_told_apart_at_most_at_the_nominal_rate_on_new_prompts(seeds, prompts):
    def once(draw: np.random.Generator) -> Inference:
        return contrast(*(crossed(draw, seeds, prompts, (0.3, 1.0, 0.5)) for _ in range(2)))

    assert rejections(MANY, once) <= 0.07


@pytest.mark.parametrize("effect", [0.5, 1.5])
def test_a_planted_effect_is_found_with_the_power_it_should_have(effect):
    from scipy.stats import nct, t

    seeds = 5
    at = effect * math.sqrt(seeds)  # noncentrality of differences with standard deviation 1
    limit = t.ppf(0.975, seeds - 1)
    power = nct.sf(limit, seeds - 1, at) + nct.cdf(-limit, seeds - 1, at)

    def once(draw: np.random.Generator) -> Inference:
        a = crossed(draw, seeds, 6, (1, 1, 0))
        return over_seeds(a + effect + draw.normal(size=(seeds, 1)) - a)

    assert rejections(MANY, once) == pytest.approx(power, abs=0.04)
