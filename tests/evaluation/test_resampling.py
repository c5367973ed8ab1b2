"""Replicates against the plain mean, where both are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_pipeline.evaluation.statistics import (
    cluster_mean,
    clustered,
    count_blocks,
    replicate_interval,
    replicate_p,
    standard_error,
    student_p,
    student_quantile,
)


def draw_counts(prompts: int, *, resamples: int = 2000) -> np.ndarray:
    return np.concatenate(list(count_blocks(prompts, resamples=resamples)))


def test_students_t_from_tables():
    assert student_quantile(4) == pytest.approx(2.776445, abs=1e-6)
    assert student_quantile(math.inf) == pytest.approx(1.959964, abs=1e-6)
    assert student_quantile(0) == math.inf
    assert student_p(2.776445, 1.0, 4) == pytest.approx(0.05, abs=1e-6)
    assert student_p(-1.0, 0.5, 1) == pytest.approx(2 * (0.5 - math.atan(2) / math.pi), abs=1e-12)  # Cauchy
    assert (student_p(0.0, 0.0, 3), student_p(0.1, 0.0, 3), student_p(1.0, math.inf, 0)) == (1.0, 0.0, None)


def test_counts_are_draws_with_replacement():
    counts = draw_counts(7, resamples=5000)
    assert counts.shape == (5000, 7) and (counts.sum(1) == 7).all()
    assert counts.var() == pytest.approx(6 / 7, rel=0.05)  # binomial(7, 1/7)
    assert (counts == draw_counts(7, resamples=5000)).all()


def test_the_replicates_are_those_of_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=80)
    replicates = draw_counts(80) @ values / 80
    mine, theirs = replicate_interval(float(values.mean()), replicates, 80, n=80), cluster_mean(values, range(80))
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert mine.method == theirs.method == "bootstrap"


def test_below_50_prompts_a_mean_has_the_t_interval_up_to_resampling_noise():
    values = np.random.default_rng(1).normal(size=16)
    replicates = draw_counts(16, resamples=200_000) @ values / 16
    mine, theirs = replicate_interval(float(values.mean()), replicates, 16, n=16), cluster_mean(values, range(16))
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)
    assert mine.method == "t"
    assert standard_error(np.array([0.0, 2.0]), 2) == pytest.approx(math.sqrt(2))
    assert standard_error(np.array([0.0, 2.0]), 1) == math.inf


def test_the_p_value_of_replicates_by_hand():
    replicates = np.arange(-9, 990, dtype=float)  # 10 of 999 are <= 0
    assert replicate_p(400.0, replicates, 60) == pytest.approx(2 * 11 / 1000)
    assert replicate_p(400.0, replicates, 60, null=-10.0) == pytest.approx(2 / 1000)  # its floor
    assert replicate_p(400.0, np.zeros(999), 60) == 1.0
    # Ten standard errors away no replicate reaches 0: the tail of t with 59 degrees, sd 1 x sqrt(60 / 59).
    far = replicate_p(10.0, np.array([9.0, 11.0] * 500), 60)
    assert far == pytest.approx(2 * stats.t.sf(10 / math.sqrt(60 / 59), 59), rel=1e-9) and far < 1e-12
    assert replicate_p(2.0, np.array([1.0, 3.0]), 2) == pytest.approx(
        2 * (0.5 - math.atan(2 / math.sqrt(2)) / math.pi), abs=1e-12
    )


@pytest.mark.parametrize("groups", [12, 90])
def test_the_p_value_goes_with_the_interval(groups):
    draw = np.random.default_rng(2)
    clusters = np.repeat(np.arange(groups), 3)
    values = draw.normal(size=groups).repeat(3) + draw.normal(size=3 * groups)
    estimate, _ = clustered(values, clusters)
    assert estimate == cluster_mean(values, clusters)
    # At the ends of the interval p is 5 %; inside it is more, outside less.
    half = (estimate.high - estimate.low) / 2
    for end in (estimate.low, estimate.high):
        assert clustered(values, clusters, null=end)[1] == pytest.approx(0.05, abs=0.002)
    assert clustered(values, clusters, null=estimate.high + half / 5)[1] < 0.05
    assert clustered(values, clusters, null=estimate.high - half / 5)[1] > 0.05


def test_p_of_prompt_means_by_hand():
    # Means 1, 2, 3: t = 2 / (1 / sqrt 3); with 2 degrees P(|T| > t) = 1 - t / sqrt(2 + t^2).
    estimate, p = clustered([0.0, 2.0, 2.0, 3.0], ["a", "a", "b", "c"])
    t = 2 * math.sqrt(3)
    assert estimate.mean == pytest.approx(2.0)
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    assert clustered([1.0, 2.0], ["a", "a"])[1] is None


def test_a_prompt_with_many_values_counts_as_one_in_the_bootstrap():
    clusters = [0] * 31 + list(range(1, 60))
    values = [1.0] * 31 + [0.0] * 59
    estimate, p = clustered(values, clusters)
    assert estimate.mean == pytest.approx(1 / 60)
    # Prompt 0 is missing in (1 - 1/60)^60 = 36.5 % of the replicates, whose mean is then 0.
    assert p == pytest.approx(2 * (1 - 1 / 60) ** 60, abs=0.05)
