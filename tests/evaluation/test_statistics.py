"""Intervals by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.evaluation.statistics import cluster_mean

# Student t, 97.5 %, from tables.
T = {1: 12.7062, 2: 4.30265, 3: 3.18245, 48: 2.01063}


def test_t_interval_over_prompt_means_by_hand():
    found = cluster_mean([1.0, 2.0, 3.0], ["a", "b", "c"])
    half = T[2] * 1.0 / math.sqrt(3)
    assert (found.mean, found.n, found.clusters, found.method) == (2.0, 3, 3, "t")
    assert found.low == pytest.approx(2 - half, abs=1e-4)
    assert found.high == pytest.approx(2 + half, abs=1e-4)


def test_values_of_one_prompt_count_as_one_mean():
    # Prompt means 1, 4, 7 though prompt a has four values: each prompt counts the same.
    found = cluster_mean([0, 2, 1, 1, 4, 6, 8], ["a", "a", "a", "a", "b", "c", "c"])
    half = T[2] * 3 / math.sqrt(3)
    assert found.mean == pytest.approx(4.0)
    assert (found.n, found.clusters) == (7, 3)
    assert found.high - found.mean == pytest.approx(half, abs=1e-4)


def test_repeating_every_value_of_a_prompt_changes_nothing_but_n():
    one = cluster_mean([1.0, 2.0, 4.0], [0, 1, 2])
    ten = cluster_mean([1.0] * 10 + [2.0] * 10 + [4.0] * 10, [0] * 10 + [1] * 10 + [2] * 10)
    assert (ten.low, ten.mean, ten.high) == pytest.approx((one.low, one.mean, one.high), abs=1e-12)
    assert (one.n, ten.n) == (3, 30)


def test_one_prompt_has_no_interval():
    found = cluster_mean([1.0, 3.0], ["a", "a"])
    assert (found.mean, found.low, found.high) == (2.0, -math.inf, math.inf)


def test_other_levels():
    # t(.95, 3) = 2.35336; values 0, 0, 2, 2: sd = sqrt(4/3)
    found = cluster_mean([0, 0, 2, 2], [1, 2, 3, 4], level=0.9)
    assert found.high - found.mean == pytest.approx(2.35336 * math.sqrt(4 / 3) / 2, abs=1e-4)


@pytest.mark.parametrize("clusters, method", [(49, "t"), (50, "bootstrap")])
def test_the_bootstrap_begins_at_50_prompts(clusters, method):
    values = np.random.default_rng(0).normal(size=clusters)
    found = cluster_mean(values, range(clusters))
    assert found.method == method
    half = (T[48] if method == "t" else 1.96) * values.std(ddof=1) / math.sqrt(clusters)
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-4 if method == "t" else 0.1)


def test_the_bootstrap_resamples_prompts_not_values():
    draw = np.random.default_rng(1)
    effects = draw.normal(size=200)
    values = np.repeat(effects, 25) + 0.01 * draw.normal(size=5000)
    found = cluster_mean(values, np.repeat(np.arange(200), 25))
    assert found.n == 5000 and found.clusters == 200
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * effects.std(ddof=1) / math.sqrt(200), rel=0.1)


def test_the_bootstrap_weighs_values_and_follows_its_seed():
    values = [1.0] * 60 + [0.0] * 30
    clusters = [0] * 31 + list(range(1, 30)) + list(range(30, 60))  # prompt 0 has 31 values
    one = cluster_mean(values, clusters)
    assert one.mean == pytest.approx(60 / 90)
    assert one == cluster_mean(values, clusters)
    assert one != cluster_mean(values, clusters, seed=1)


def test_equal_values_have_an_interval_of_one_point():
    for count in (10, 80):
        found = cluster_mean([0.25] * count, range(count))
        assert (found.low, found.mean, found.high) == pytest.approx((0.25,) * 3, abs=1e-15)


def test_the_order_of_values_does_not_matter():
    draw = np.random.default_rng(2)
    values, clusters = draw.normal(size=30), draw.integers(0, 6, 30)
    order = draw.permutation(30)
    one, other = cluster_mean(values, clusters), cluster_mean(values[order], clusters[order])
    assert (one.low, one.mean, one.high) == pytest.approx((other.low, other.mean, other.high), abs=1e-12)


def test_intervals_of_16_prompts_cover_at_the_nominal_rate():
    draw = np.random.default_rng(3)
    count = 2000
    hits = 0
    for values in draw.normal(1.0, 2.0, (count, 16)):
        found = cluster_mean(values, range(16))
        hits += found.low <= 1.0 <= found.high
    assert abs(hits / count - 0.95) < 4 * math.sqrt(0.95 * 0.05 / count)


@pytest.mark.parametrize("values, clusters", [([], []), ([1.0], []), ([1.0, 2.0], ["a"])])
def test_lists_that_do_not_match_are_refused(values, clusters):
    with pytest.raises(ValueError, match="equally many"):
        cluster_mean(values, clusters)


def test_an_estimate_prints_and_exports():
    found = cluster_mean([1.0, 2.0, 3.0], ["a", "b", "c"])
    assert str(found) == "2.000 [-0.484, 4.484]"
    assert found.as_dict()["method"] == "t"
