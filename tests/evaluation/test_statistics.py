"""Intervals by hand."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from rlhf_pipeline.evaluation.statistics import (
    cluster_mean,
    clustered,
    count_blocks,
    effective_size,
    mean_replicates,
    prompt_weights,
    wilson_interval,
)
from tests.evaluation.shares import covers, drawn

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


@pytest.mark.parametrize("prompts", [49, 50])
def test_rankings_of_unequal_size_have_one_estimand(prompts):
    """Every third prompt has 6 pairs, all right; the others one pair, of which half are right."""
    values, clusters = [], []
    for prompt in range(prompts):
        pairs = 6 if prompt % 3 == 0 else 1
        values += [1.0 if pairs == 6 else float(prompt % 2)] * pairs
        clusters += [prompt] * pairs
    long, alone = [p for p in range(prompts) if p % 3 == 0], [p for p in range(prompts) if p % 3]
    expected = (len(long) + sum(p % 2 for p in alone)) / prompts
    for share in (False, True):
        assert cluster_mean(values, clusters, share=share).mean == pytest.approx(expected, abs=1e-12)
    assert clustered(values, clusters)[0].mean == pytest.approx(expected, abs=1e-12)
    assert np.mean(values) > expected + 0.1  # a mean over pairs is another figure


def test_the_bootstrap_is_the_same_each_time():
    values = [1.0] * 60 + [0.0] * 30
    clusters = [0] * 31 + list(range(1, 30)) + list(range(30, 60))  # prompt 0 has 31 values
    one = cluster_mean(values, clusters)
    assert one.mean == pytest.approx(30 / 60)
    assert one == cluster_mean(values, clusters)


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


def test_wilsons_interval_by_hand():
    # Wilson 1927: 8 of 10 at z = 1.959964: (.8 + z^2/20 +- z sqrt(.016 + z^2/400)) / (1 + z^2/10).
    assert wilson_interval(0.8, 10, 1.959964) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    # All of n: [n / (n + z^2), 1]; none of n: the mirror.
    low, high = wilson_interval(1.0, 16, 2.0)
    assert (low, high) == (pytest.approx(0.8, abs=1e-12), 1.0)
    assert wilson_interval(0.0, 16, 2.0) == (0.0, pytest.approx(0.2, abs=1e-12))
    assert wilson_interval(0.3, 0, 2.0) == wilson_interval(0.3, 5, math.inf) == (0.0, 1.0)


def test_the_effective_size_by_hand():
    # Eight prompts that all agree and half a one that does not: m = 16/17, s'^2 = (4 / 8.5) / 7.5.
    assert effective_size(1.0, 0.0, 8) == pytest.approx(8 * (16 / 17) * (1 / 17) / (4 / 8.5 / 7.5), abs=1e-12)
    assert effective_size(0.0, 0.0, 8) == pytest.approx(effective_size(1.0, 0.0, 8), abs=1e-12)
    # Four of eight at 1, four at 1/2: squares 8/16; w = 1/4/2 more at 0 adds w 8 / (8 + w) x 9/16; over 7 + w.
    middle = 6 / 8.125
    spread = (0.5 + 0.125 * 8 / 8.125 * 9 / 16) / 7.125
    assert effective_size(0.75, 0.5 / 7 / 8, 8, agree=0.5) == pytest.approx(8 * middle * (1 - middle) / spread)
    assert effective_size(0.75, 0.5 / 7 / 8, 8) == pytest.approx(0.75 * 0.25 / (0.5 / 7 / 8))  # none at an end
    # As many as there are prompts, not samples, where these all agree; independent answers where there are many.
    assert effective_size(1.0, 0.0, 1000) == pytest.approx(1000, rel=0.002)
    assert effective_size(0.8, 0.8 * 0.2 / 40_000, 10_000) == pytest.approx(40_000, rel=0.001)
    assert effective_size(0.5, math.inf, 4) == 0.0


def test_a_share_that_is_always_reached_is_not_certain():
    found = cluster_mean([1.0] * 64, np.repeat(np.arange(16), 4), share=True)
    assert (found.mean, found.high, found.method) == (1.0, 1.0, "wilson")
    assert 0.7 < found.low < 0.8  # 16 prompts that agree: 1 - t^2 / (16 + t^2) = .779 without the half prompt
    none = cluster_mean([0.0] * 64, np.repeat(np.arange(16), 4), share=True)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - found.low, abs=1e-12))
    alone = cluster_mean([1.0, 1.0], ["a", "a"], share=True)
    assert (alone.low, alone.high) == (0.0, 1.0)


def test_a_share_of_many_prompts_has_the_t_interval():
    values = np.random.default_rng(4).binomial(4, 0.6, 20_000) / 4
    found, plain = cluster_mean(values, range(20_000), share=True), values.std(ddof=1) / math.sqrt(20_000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * plain, rel=0.002)


def test_many_answers_that_are_spread_evenly_are_counted():
    """Eight prompts of 64 answers, between 58 and 61 right: known to a few hundredths, as Student's t has it."""
    means = np.array([58, 59, 59, 60, 60, 60, 61, 61]) / 64
    found, plain = cluster_mean(means, range(8), share=True), cluster_mean(means, range(8))
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=0.01)


@pytest.mark.parametrize("alike", [0.0, 0.3])
@pytest.mark.parametrize("p", [0.9, 0.97, 0.99])
@pytest.mark.parametrize("prompts", [8, 16, 64])
def test_a_share_near_1_is_covered(prompts, p, alike):
    """1,500 draws: a standard error of half a point. `test_coverage.py` has the long one."""
    assert covers(drawn(np.random.default_rng(5), 1500, prompts, p, alike), p) >= 0.93


def test_weights_make_every_prompt_count_the_same():
    assert prompt_weights(["a", "a", "b", "c", "c"]) == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6])


def test_the_bootstrap_draws_the_same_in_blocks_of_any_size(monkeypatch):
    from rlhf_pipeline.evaluation import statistics

    means = np.random.default_rng(6).normal(size=90)
    at_once = np.random.default_rng(0).integers(0, 90, (700, 90))
    expected = means[at_once].mean(1)
    for size in (1, 1000, 2**18):
        monkeypatch.setattr(statistics, "BLOCK", size)
        assert mean_replicates(means, resamples=700) == pytest.approx(expected, abs=1e-12)
        blocks = list(count_blocks(90, resamples=700))
        assert max(block.size for block in blocks) <= max(size, 90)


def test_the_bootstrap_of_many_prompts_needs_little_memory():
    values = np.random.default_rng(7).normal(size=20_000)
    tracemalloc.start()
    found = clustered(values, range(20_000), resamples=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0].method == "bootstrap"
    assert peak < 24 * 2**20  # all 100 x 20,000 draws at once are 16 MB, and 32 with their counts
