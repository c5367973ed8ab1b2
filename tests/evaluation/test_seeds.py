"""Seeds and prompts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.evaluation.seeds import (
    contrast,
    from_replicates,
    holm,
    infer,
    needed,
    over_prompts,
    over_seeds,
    over_seeds_and_prompts,
)
from rlhf_pipeline.evaluation.statistics import Estimate, cluster_mean, count_blocks


def draw_counts(prompts: int, *, resamples: int = 2000) -> np.ndarray:
    return np.concatenate(list(count_blocks(prompts, resamples=resamples)))


# Student t, 97.5 %, from tables.
T = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216}


def p_of_2_degrees(t: float) -> float:
    return 1 - t / math.sqrt(2 + t * t)


def test_t_over_seeds_by_hand():
    # Seed means 1, 2, 3 whatever the prompts do.
    found = over_seeds([[0.0, 2.0], [-8.0, 12.0], [3.0, 3.0]])
    assert (found.estimate.mean, found.estimate.n, found.estimate.clusters) == (2.0, 6, 3)
    assert found.estimate.high - 2 == pytest.approx(T[2] / math.sqrt(3), abs=1e-4)
    assert found.p == pytest.approx(p_of_2_degrees(2 * math.sqrt(3)), abs=1e-12)
    assert found.estimate.method == "t over seeds"
    alone = over_seeds([1.0, 2.0, 3.0])
    assert (alone.estimate.low, alone.estimate.high, alone.p) == (found.estimate.low, found.estimate.high, found.p)


def test_the_crossed_form_by_hand():
    # Seed means 1, 3: s^2 = 2; prompt means 0, 2, 4: s^2 = 4. Squared error 2/2 + 4/3.
    table = np.array([[-1.0, 1.0, 3.0], [1.0, 3.0, 5.0]])
    found = over_seeds_and_prompts(table)
    error = math.sqrt(1 + 4 / 3)
    assert found.estimate.mean == pytest.approx(2.0)
    assert found.estimate.high - 2 == pytest.approx(T[1] * error, rel=1e-5)
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2 / error), abs=1e-12)  # Cauchy
    assert found.estimate.method == "t over seeds and prompts"


def test_one_seed_is_the_interval_over_prompts_and_says_so():
    for count in (16, 60):
        values = np.random.default_rng(0).normal(size=count)
        found = infer(values[None])
        assert found.estimate == cluster_mean(values, range(count))
        assert found == over_prompts(values)
    assert over_prompts([1.0, 2.0, 3.0]).p == pytest.approx(p_of_2_degrees(2 * math.sqrt(3)), abs=1e-12)


def test_one_number_has_no_interval_and_no_p_value():
    for values in ([1.5], [[1.5]]):
        found = infer(values)
        assert (found.estimate.mean, found.estimate.low, found.p) == (1.5, -math.inf, None)
        assert needed(found.estimate) is None


def test_infer_takes_the_statement_that_is_wanted():
    table = np.random.default_rng(1).normal(size=(3, 8))
    assert infer(table) == over_seeds_and_prompts(table)
    assert infer(table[:, 0]) == over_seeds(table[:, 0])
    assert infer(table[:, :1]) == over_seeds(table[:, :1])  # one prompt: nothing to say about others


def test_differences_are_paired():
    draw = np.random.default_rng(2)
    prompts, seeds = draw.normal(size=(1, 5)) * 100, draw.normal(size=(3, 1)) * 100
    b = prompts + seeds
    found = contrast(b + np.array([[1.0], [2.0], [3.0]]), b)
    assert found.estimate.mean == pytest.approx(2.0)
    assert found.estimate.high - 2 == pytest.approx(T[2] / math.sqrt(3), abs=1e-4)
    back = contrast(b, b + np.array([[1.0], [2.0], [3.0]]))
    assert (-back.estimate.high, back.p) == pytest.approx((found.estimate.low, found.p), abs=1e-12)
    nothing = contrast(b, b)
    assert (nothing.estimate.mean, nothing.estimate.low, nothing.p) == (0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(1, 5\)"):
        contrast(b, b[:1])


def test_a_share_ends_at_0_and_1_and_is_tested_against_one_half():
    found = over_seeds([0.9, 1.0, 0.95], null=0.5, share=True)
    assert found.estimate.method == "wilson over seeds"
    # Squares .005; one seed of three is at 1: w = 1/9/2 of a seed more at 0 adds w 3 / (3 + w) x .95^2; over 2 + w.
    w = 1 / 18
    middle = 2.85 / (3 + w)
    size = 3 * middle * (1 - middle) / ((0.005 + w * 3 / (3 + w) * 0.95**2) / (2 + w))
    assert found.p == pytest.approx(p_of_2_degrees(0.45 / math.sqrt(0.25 / size)), abs=1e-12)
    assert 0 < found.estimate.low < 0.95 < found.estimate.high < 1


def test_seeds_that_all_agree_do_not_make_a_share_certain():
    """Three seeds on 8 prompts, every response right: as sure as the 8 prompts are, not as three figures."""
    three, one = infer(np.ones((3, 8)), share=True).estimate, infer(np.ones((1, 8)), share=True).estimate
    assert (three.mean, three.high, three.method) == (1.0, 1.0, "wilson over seeds and prompts")
    assert three.low == pytest.approx(one.low, abs=1e-12) and 0.5 < one.low < 0.6
    assert infer(np.zeros((3, 8)), share=True).estimate.high == pytest.approx(1 - three.low, abs=1e-12)


def test_the_p_value_of_a_share_goes_with_its_interval():
    draw = np.random.default_rng(5)
    for table in (draw.binomial(4, 0.8, (1, 30)) / 4, draw.binomial(4, 0.8, (4, 30)) / 4):
        found = infer(table, share=True).estimate
        for end in (found.low, found.high):
            assert infer(table, share=True, null=end).p == pytest.approx(0.05, abs=1e-9)
    assert infer(np.ones((1, 60)), share=True, null=0.5).p > 1e-60  # a sweep of 60 prompts, not certainty
    assert infer(np.ones((1, 60)), share=True).p is None  # against 0 nothing is tested


@pytest.mark.parametrize("values", [[], [[]], [[[1.0]]], [1.0, math.nan], [[1.0, math.inf]], 3.0])
def test_tables_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match="found"):
        infer(values)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        over_seeds_and_prompts([[1.0, 2.0]])


def test_replicates_of_a_mean_give_what_the_mean_gives():
    draw = np.random.default_rng(3)
    table = draw.normal(size=(4, 64)) + draw.normal(size=(4, 1)) + draw.normal(size=64)
    replicates = draw_counts(64, resamples=20_000) @ table.T / 64
    mine, theirs = from_replicates(table.mean(1), replicates, 64), infer(table)
    assert (mine.estimate.low, mine.estimate.high) == pytest.approx(
        (theirs.estimate.low, theirs.estimate.high), rel=0.02
    )
    assert mine.p == pytest.approx(theirs.p, rel=0.05)
    one = from_replicates(table[:1].mean(1), draw_counts(64) @ table[:1].T / 64, 64)
    theirs = over_prompts(table[0])
    assert (one.estimate.low, one.estimate.high, one.p) == pytest.approx(
        (theirs.estimate.low, theirs.estimate.high, theirs.p), abs=1e-12
    )
    assert one.estimate.method == "bootstrap"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, None, 0.03]) == pytest.approx([0.04, None, 0.04])
    assert holm([None]) == [None] and holm([]) == []


def test_needed_seeds_by_hand():
    # Mean 1, s = 2 over three seeds. t(N - 1) x 2 / sqrt(N) < 1 first at N = 18: 2.109816 x 2 / sqrt 18 = .9946;
    # at 17, 2.119905 x 2 / sqrt 17 = 1.0283.
    found = over_seeds([-1.0, 1.0, 3.0])
    assert found.estimate.mean == 1.0
    assert needed(found.estimate) == {"count": 18, "unit": "seeds"}


def test_needed_prompts_by_hand():
    # From 50 on: (1.959964 s / effect)^2 with s^2 = .25 x 80/79 and an effect of .05: 389.01.
    half = 1.959964 * math.sqrt(0.25 / 79)
    found = needed(Estimate(0.05, 0.05 - half, 0.05 + half, 80, 80, "bootstrap"))
    assert found == {"count": 390, "unit": "prompts"}
    # Below 50: half-width 1 at 10 prompts, effect 1/2: t(N - 1) sqrt(10 / N) / t(9) < 1/2.
    found = needed(Estimate(0.5, -0.5, 1.5, 10, 10, "t"))
    assert found == {"count": 33, "unit": "prompts"}
    assert 2.036933 * math.sqrt(10 / 33) / T[9] < 0.5 < 2.039513 * math.sqrt(10 / 32) / T[9]


def test_needed_of_the_crossed_form():
    # Both growing alike, from 5 seeds: t(N - 1) sqrt(.45 x 5 / N) < 1 first at N = 12 (.9531; 11: 1.0077).
    half = T[4] * math.sqrt(0.45)
    found = needed(Estimate(1.0, 1 - half, 1 + half, 80, 5, "t over seeds and prompts"))
    assert found == {"count": 12, "unit": "seeds (and prompts in proportion)"}


def test_needed_is_none_without_an_effect():
    assert needed(over_seeds([-1.0, 1.0, 0.0]).estimate) is None
    assert needed(over_prompts(np.array([1.0, -1.0] * 40) + 1e-4).estimate) is None  # 4e8 prompts
    assert needed(Estimate(1.0, -math.inf, math.inf, 1, 1, "t")) is None


@pytest.mark.parametrize("seed", range(5))
def test_what_excludes_0_needs_no_more_than_it_has(seed):
    values = np.random.default_rng(seed).normal(0.6, 1.0, 12)
    found = over_seeds(values)
    enough = needed(found.estimate)["count"] <= 12
    assert enough == (found.p < 0.05) == (found.estimate.low > 0)
