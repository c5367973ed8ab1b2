"""Curves of straight lines, read by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.frontier import (
    Curve,
    area_between,
    choose,
    common_range,
    difference_at,
    interpolate,
    pareto,
    reward_at,
)
from rlhf_pipeline.evaluation.seeds import infer
from rlhf_pipeline.evaluation.statistics import cluster_mean


def flat(x, reward, prompts: int = 4, seeds: int = 1) -> Curve:
    """A curve without noise: the same on every prompt and seed."""
    shape = (seeds, len(x), prompts)
    return Curve.of(*(np.broadcast_to(np.array(v, dtype=float)[None, :, None], shape) for v in (x, reward)))


def test_pareto_points_by_hand():
    kl, reward = [1.0, 3.0, 2.0, 4.0, 0.5], [2.0, 5.0, 1.5, 4.9, 1.0]
    assert pareto(kl, reward) == [4, 0, 1]
    assert pareto([1.0, 1.0, 2.0], [3.0, 4.0, 4.0]) == [1]
    assert pareto([1.0, 1.0], [2.0, 2.0]) == [0]
    # A convex corner stays: Pareto-optimal, though below the chord of its neighbours.
    assert pareto([0.0, 1.0, 2.0], [0.0, 0.1, 2.0]) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_pareto_against_all_pairs(seed):
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 6, (2, 12))
    beaten = {i for i in range(12) for j in range(12) if x[j] <= x[i] and y[j] >= y[i] and (x[j], y[j]) != (x[i], y[i])}
    found = pareto(x, y)
    assert {(x[i], y[i]) for i in found} == {(x[i], y[i]) for i in range(12) if i not in beaten}
    assert len(found) == len({(x[i], y[i]) for i in found})


def test_settings_are_chosen_by_means_over_seeds_and_prompts():
    x = np.array([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]] * 2)
    reward = np.array([[[0.0, 2.0], [0.0, 1.0], [5.0, 5.0]], [[1.0, 1.0], [0.0, 2.0], [5.0, 5.0]]])  # means 1, .75, 5
    assert choose(Curve.of(x, reward)) == [0, 2]
    assert Curve.of(x, reward).means()[0].tolist() == [[1.0, 2.0, 3.0]] * 2
    assert Curve.of(x, reward).means()[1].tolist() == [[1.0, 0.5, 5.0], [1.0, 1.0, 5.0]]


def test_interpolation_by_hand():
    x, y = np.array([3.0, 1.0, 2.0]), np.array([10.0, 0.0, 4.0])
    found = interpolate(x, y, np.array([1.0, 1.25, 2.0, 2.5, 3.0]))
    assert found.tolist() == pytest.approx([0.0, 1.0, 4.0, 7.0, 10.0])
    assert np.isnan(interpolate(x, y, np.array([0.999, 3.001]))).all()
    several = interpolate(np.array([[0.0, 1.0], [1.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([0.5, 1.5]))
    assert several == pytest.approx(np.array([[0.5, np.nan], [np.nan, 0.5]]), nan_ok=True)
    assert interpolate(np.array([2.0]), np.array([5.0]), np.array([2.0, 2.1])) == pytest.approx(
        [5.0, np.nan], nan_ok=True
    )
    assert interpolate(np.array([1.0, 1.0, 2.0]), np.array([7.0, 0.0, 1.0]), np.array([1.5])) == pytest.approx([0.5])
    assert interpolate(np.array([1.0, 1.0]), np.array([7.0, 3.0]), np.array([1.0])) == pytest.approx([3.0])


def test_the_difference_at_the_middle_of_the_common_range():
    a, b = flat([1, 3, 5], [0, 4, 6]), flat([2, 6], [1, 3])
    assert common_range(a, b) == (2.0, 5.0)
    found = difference_at(a, b)  # at 3.5: 4.5 - 1.75
    assert (found.at, found.missed) == (3.5, 0.0)
    assert found.inference.estimate.mean == pytest.approx(2.75)
    assert difference_at(a, b, 4.0).inference.estimate.mean == pytest.approx(5 - 2)
    assert reward_at(a, 2.0).inference.estimate.mean == pytest.approx(2.0)


def test_nothing_is_extrapolated():
    a, b = flat([1, 2], [0, 1]), flat([3, 4], [5, 6])
    found = difference_at(a, b, names=("ppo", "dpo"))
    assert found.inference is None and found.at is None and common_range(a, b) is None
    assert "no common range: ppo covers 1 to 2, dpo covers 3 to 4" in found.why_not
    found = difference_at(a, flat([1.5, 4], [5, 6]), 3.0, names=("ppo", "dpo"))
    assert (
        found.inference is None
        and "not reached: ppo covers 1 to 2" in found.why_not
        and "requested is 3" in found.why_not
    )
    assert reward_at(a, 2.1).inference is None and reward_at(a, 2.0).inference is not None
    assert area_between(a, b).inference is None
    assert reward_at(flat([2], [5]), 2.5).inference is None


def test_the_area_over_the_common_range_by_hand():
    # a: 0 at 0, 4 at 2, 4 at 4. b: 1 throughout, from 1 to 5. Over [1, 4]: a is 2 at 1, 4 from 2 on:
    # (2 + 4) / 2 x 1 + 4 x 2 - 3 = 8; divided by the width 3.
    found = area_between(flat([0, 2, 4], [0, 4, 4]), flat([1, 5], [1, 1]))
    assert found.inference.estimate.mean == pytest.approx(8 / 3)
    assert area_between(flat([1, 5], [1, 1]), flat([0, 2, 4], [0, 4, 4])).inference.estimate.mean == pytest.approx(
        -8 / 3
    )


def test_the_area_is_the_integral():
    draw = np.random.default_rng(0)
    a = flat(draw.random(6) * 4, draw.normal(size=6))
    b = flat(draw.random(5) * 4, draw.normal(size=5))
    low, high = common_range(a, b)
    grid = np.linspace(low, high, 200_001)
    gap = [interpolate(*(means[0] for means in curve.means()), grid) for curve in (a, b)]
    assert area_between(a, b).inference.estimate.mean == pytest.approx(np.mean(gap[0] - gap[1]), abs=1e-4)


def noisy(prompts: int, seeds: int, slope: float, seed: int) -> Curve:
    draw = np.random.default_rng(seed)
    x = np.array([1.0, 2.0, 4.0])[None, :, None] + 0.3 * draw.normal(size=(seeds, 3, prompts))
    return Curve.of(x, slope * x + draw.normal(size=(seeds, 1, 1)) + draw.normal(size=(seeds, 3, prompts)))


def test_where_x_has_no_noise_it_is_the_paired_difference_of_the_points():
    draw = np.random.default_rng(1)
    one, other = draw.normal(size=(2, 1, 2, 80))
    a, b = Curve.of([[1.0, 3.0]], one), Curve.of([[1.0, 3.0]], other)
    found = difference_at(a, b, 3.0).inference
    expected = cluster_mean(one[0, 1] - other[0, 1], range(80))
    assert (found.estimate.mean, found.estimate.low, found.estimate.high) == pytest.approx(
        (expected.mean, expected.low, expected.high), abs=1e-9
    )
    middle = difference_at(a, b).inference.estimate
    expected = cluster_mean((one - other)[0].mean(0), range(80))
    assert (middle.low, middle.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_each_seed_has_its_own_curves():
    a, b = noisy(40, 4, 1.0, 2), noisy(40, 4, 0.5, 3)
    found = difference_at(a, b, 2.5).inference.estimate
    each = [difference_at(Curve(a.x[[s]], a.reward[[s]]), Curve(b.x[[s]], b.reward[[s]]), 2.5) for s in range(4)]
    expected = infer([one.inference.estimate.mean for one in each]).estimate
    assert found.mean == pytest.approx(expected.mean, abs=1e-9)
    # The prompts' part of the variance is added to the seeds'.
    assert found.method == "t over seeds and prompts" and found.low < expected.low < expected.high < found.high


def test_replicates_that_do_not_reach_it_are_counted():
    a, b = noisy(60, 1, 1.0, 4), flat([0, 9], [0, 0], prompts=60)
    high = float(a.means()[0].max())
    spread = float(a.x[0, 2].std() / np.sqrt(60))
    # One standard error inside the end of the range: 16 % of the replicates end before it.
    found = difference_at(a, b, high - spread)
    assert found.inference is None
    assert found.missed == pytest.approx(0.159, abs=0.03)
    assert "of the resampled sets of prompts" in found.why_not
    found = difference_at(a, b, high - 2 * spread)
    assert 0.005 < found.missed < 0.05 and found.inference is not None
    assert difference_at(a, b, high - 6 * spread).missed == 0.0


def test_a_cost_in_the_place_of_kl():
    reward = np.random.default_rng(5).normal(size=(2, 3, 30))
    cost = np.array([[1e15, 2e15, 4e15], [1.1e15, 2.1e15, 4.1e15]])
    curve = Curve.of(cost, reward)
    assert curve.x.shape == reward.shape
    assert common_range(curve) == pytest.approx((1.1e15, 4e15))
    # The ends of a range without noise are reached in every replicate.
    for at in (1.1e15, 4e15):
        assert reward_at(curve, at).missed == 0.0
    assert reward_at(curve, 1.05e15).why_not.startswith("not reached")
    assert Curve.of([1.0, 2.0, 3.0], reward[0]).x.shape == (1, 3, 30)


@pytest.mark.parametrize("x", [(3, 2, 7), (3, 2), (7, 2), (2,), (1, 3)])
def test_shapes_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match="found x"):
        Curve.of(np.zeros(x), np.zeros((2, 3, 7)))


def test_curves_of_other_seeds_or_prompts_do_not_pair():
    with pytest.raises(ValueError, match="the same in all"):
        difference_at(noisy(10, 1, 1.0, 0), noisy(12, 1, 1.0, 1))
    with pytest.raises(ValueError, match="finite"):
        Curve.of([[1.0]], [[[np.nan]]])
