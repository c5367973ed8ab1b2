"""The two laws and the criterion, on data that follow them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.evaluation.overoptimisation import fit_gain, overoptimised

DISTANCE = np.array([0.0, 0.6, 1.0, 1.7, 2.4, 3.0])


def bon(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return d * (alpha - beta * d)


def rl(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return np.array([x * (alpha - beta * math.log(x)) if x else 0.0 for x in d])


def test_best_of_n_coefficients_come_back():
    found = fit_gain("bon", DISTANCE, bon(DISTANCE, 2.0, 0.5))
    assert (found.alpha, found.beta, found.peak) == pytest.approx((2.0, 0.5, 2.0), abs=1e-12)
    assert found.residual == pytest.approx(0.0, abs=1e-12)
    assert found.points == 5  # 0 says nothing


def test_rl_coefficients_come_back_and_the_peak_is_a_maximum():
    found = fit_gain("rl", DISTANCE, rl(DISTANCE, 1.0, 0.8))
    assert (found.alpha, found.beta) == pytest.approx((1.0, 0.8), abs=1e-12)
    assert found.peak == pytest.approx(math.exp(0.25), abs=1e-12)
    beside = rl(found.peak + np.array([-1e-3, 0.0, 1e-3]), found.alpha, found.beta)
    assert beside[1] > max(beside[0], beside[2])
    assert (found.least, found.largest) == (0.6, 3.0)


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_nothing_is_said_outside_the_data(form):
    """From half the range the fit predicts what the other half does not do, and puts a peak there."""
    gain = 1 - np.exp(-DISTANCE)  # levels off, and never falls
    near = DISTANCE <= 1.7
    found = fit_gain(form, DISTANCE[near], gain[near])
    assert (found.least, found.largest) == (0.6, 1.7)
    assert found.beta > 0 and found.peak is None  # a maximum beyond 1.7
    whole = fit_gain(form, DISTANCE, bon(DISTANCE, 2.0, 0.6))
    assert whole.least < whole.peak < whole.largest


def test_the_rl_form_leaves_out_what_is_near_0():
    d = np.array([0.01, 0.2, 0.6, 1.0, 2.0])
    gain = rl(d, 1.0, 0.5)
    gain[:2] = -99.0
    found = fit_gain("rl", d, gain)
    assert (found.alpha, found.beta, found.points) == (pytest.approx(1.0), pytest.approx(0.5), 3)
    assert fit_gain("rl", d[:4], gain[:4]) is None  # two points are left


def test_least_squares_by_hand():
    # R / d = alpha - beta d through (1, 2), (2, 2), (3, 0) in the metric of R: normal equations in (alpha, -beta) with
    # features d, d^2 and values 2, 4, 0: [14 36; 36 98] x = [10; 18] -> x = (332, -108) / 76.
    found = fit_gain("bon", [1.0, 2.0, 3.0], [2.0, 4.0, 0.0])
    assert (found.alpha, found.beta) == pytest.approx((332 / 76, 108 / 76), abs=1e-12)


def test_curves_without_a_peak():
    assert fit_gain("bon", DISTANCE, bon(DISTANCE, 1.0, -0.2)).peak is None
    assert fit_gain("bon", DISTANCE, bon(DISTANCE, -1.0, 0.2)).peak is None
    assert fit_gain("rl", DISTANCE, rl(DISTANCE, 1.0, -0.2)).peak is None
    assert fit_gain("rl", DISTANCE, rl(DISTANCE, 1.0, 1e-3)).peak is None


def test_too_few_points_and_points_that_are_none():
    assert fit_gain("bon", [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]) is None
    assert fit_gain("bon", [1.0, 1.0, 2.0], [1.0, 1.1, 2.0]) is None
    for d, y in (([1.0], [1.0, 2.0]), ([-1.0], [1.0]), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="expected equally many"):
            fit_gain("bon", d, y)


def per_prompt(curve: np.ndarray, noise: float, seed: int, shape=(1, 100)) -> np.ndarray:
    seeds, prompts = shape
    draw = np.random.default_rng(seed)
    prompt = draw.normal(size=(1, 1, prompts))
    return curve[None, :, None] + prompt + noise * draw.normal(size=(seeds, len(curve), prompts))


def test_a_planted_fall_is_found():
    gold = per_prompt(bon(DISTANCE, 2.0, 0.6), 0.3, 0)  # peak 1.67 at 1.67, .6 at 3
    proxy = per_prompt(DISTANCE, 0.3, 1)
    law = fit_gain("bon", DISTANCE, gold.mean((0, 2)) - gold[:, 0].mean())
    found = overoptimised(DISTANCE, proxy, gold, law)
    assert found.found and found.p < 0.05
    assert "falls from d = 1.70 to 3.00" in found.why  # 1.7 is the highest of the points
    seeds = [per_prompt(x, 0.3, 2, (5, 20)) for x in (DISTANCE, bon(DISTANCE, 2.0, 0.6))]
    assert overoptimised(DISTANCE, *seeds, law).found
    assert overoptimised(DISTANCE[::-1], proxy[:, ::-1], gold[:, ::-1], law).why == found.why


def test_a_fall_of_both_rewards_is_none():
    gold = per_prompt(bon(DISTANCE, 2.0, 0.6), 0.3, 0)
    law = fit_gain("bon", DISTANCE, bon(DISTANCE, 2.0, 0.6))
    found = overoptimised(DISTANCE, gold, gold, law)
    assert not found.found and "is certain" in found.why and found.p == 1.0


def test_a_peak_outside_the_data_is_none():
    gold, proxy = per_prompt(bon(DISTANCE, 2.0, 0.1), 0.3, 0), per_prompt(DISTANCE, 0.3, 1)
    found = overoptimised(DISTANCE, proxy, gold, fit_gain("bon", DISTANCE, bon(DISTANCE, 2.0, 0.1)))
    assert not found.found and "no peak inside the data, d = 0.60 to 3.00" in found.why
    found = overoptimised(DISTANCE, proxy, gold, fit_gain("bon", DISTANCE, bon(DISTANCE, 2.0, -0.1)))
    assert not found.found and "no peak" in found.why
    assert not overoptimised(DISTANCE, proxy, gold, None).found


def test_what_is_level_is_seldom_taken_for_a_fall():
    """A gold reward that does not change from point to point, and a fit that has its peak inside the data."""
    law = fit_gain("bon", DISTANCE, bon(DISTANCE, 2.0, 0.6))
    draw, count, found = np.random.default_rng(4), 1000, 0
    for _ in range(count):
        gold = draw.normal(size=(1, 6, 30))
        proxy = DISTANCE[:, None] + 0.1 * draw.normal(size=(1, 6, 30))
        found += overoptimised(DISTANCE, proxy, gold, law).found
    assert found / count <= 0.05


def test_one_prompt_and_one_seed_decide_nothing():
    law = fit_gain("bon", DISTANCE, bon(DISTANCE, 2.0, 0.6))
    gold = bon(DISTANCE, 2.0, 0.6)[None, :, None]
    assert "no interval" in overoptimised(DISTANCE, DISTANCE[None, :, None], gold, law).why
    with pytest.raises(ValueError, match="expected"):
        overoptimised(DISTANCE, np.zeros((1, 5, 2)), gold, law)
