"""Bradley-Terry against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.evaluation.elo import bradley_terry, rank
from rlhf_pipeline.evaluation.statistics import cluster_mean

T_63, T_19, T_15 = 1.998341, 2.093024, 2.131450  # Student t, 97.5 %, from tables


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("p", [0.5, 0.61, 0.02, 0.9999])
def test_two_models_are_the_logit_of_the_win_rate(p):
    s = bradley_terry([[0.0, 40 * p], [40 * (1 - p), 0.0]])
    assert s[0] - s[1] == pytest.approx(math.log(p / (1 - p)), abs=1e-9)
    assert s.sum() == pytest.approx(0.0, abs=1e-12)


def test_expected_wins_give_the_strengths_back():
    true = np.array([1.3, 0.2, -0.5, -1.0])
    games = np.array([[0, 5, 9, 1], [5, 0, 2, 0], [9, 2, 0, 4], [1, 0, 4, 0]], dtype=float)  # one pair never met
    wins = games * np.array([[sigma(a - b) for b in true] for a in true])
    assert bradley_terry(wins) == pytest.approx(true, abs=1e-9)


def test_a_chain_is_a_sum_of_logits():
    # 1 against 2 and 2 against 3 only.
    s = bradley_terry([[0, 3, 0], [1, 0, 4], [0, 1, 0]])
    assert s[0] - s[1] == pytest.approx(math.log(3), abs=1e-9)
    assert s[1] - s[2] == pytest.approx(math.log(4), abs=1e-9)


def test_the_diagonal_and_the_order_do_not_matter():
    wins = np.random.default_rng(0).random((5, 5)) + 0.1
    order = [3, 0, 4, 1, 2]
    found = bradley_terry(wins)
    assert bradley_terry(wins + 7 * np.eye(5)) == pytest.approx(found, abs=1e-10)
    assert bradley_terry(wins[np.ix_(order, order)]) == pytest.approx(found[order], abs=1e-10)


def test_the_score_equations_hold():
    wins = np.random.default_rng(1).integers(0, 9, (6, 6)).astype(float)
    s = bradley_terry(wins)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        expected = sum((wins[i, j] + wins[j, i]) * sigma(s[i] - s[j]) for j in others)
        assert expected == pytest.approx(sum(wins[i, j] for j in others), abs=1e-8)


@pytest.mark.parametrize(
    "wins, message",
    [
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "a path of wins"),
        ([[0, 30], [0, 0]], "never lost"),
        ([[0, 1], [-1, 0]], "nothing negative"),
        ([[0, 1, 2], [1, 0, 2]], "expected"),
    ],
)
def test_what_has_no_maximum_is_refused(wins, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(wins)


def test_models_that_nothing_joins_have_no_ranking():
    wins = np.zeros((5, 3, 3))
    wins[:, 0, 1] = wins[:, 1, 0] = 0.5
    with pytest.raises(ValueError, match="joins with the baseline"):
        rank(wins)


def two(rates: np.ndarray) -> np.ndarray:
    """(P, 2, 2) wins of two models from the win rate of the first on each prompt."""
    wins = np.zeros((len(rates), 2, 2))
    wins[:, 0, 1], wins[:, 1, 0] = rates, 1 - rates
    return wins


def test_elo_of_two_models_by_hand():
    rates = np.array([1.0] * 48 + [0.0] * 16)  # odds of 3
    a, b = rank(two(rates), baseline=1)
    assert (b.elo.mean, b.elo.low, b.elo.high) == (1000.0, 1000.0, 1000.0)
    assert a.elo.mean == pytest.approx(1000 + 400 * math.log10(3), abs=1e-6)
    # The delta method: d logit(p) = dp / (p (1 - p)), with the standard error s / sqrt(P) of the mean.
    half = T_63 * rates.std(ddof=1) / 8 / (0.75 * 0.25) * 400 / math.log(10)
    assert (a.elo.high - a.elo.mean, a.elo.mean - a.elo.low) == pytest.approx((half, half), rel=1e-6)
    assert (a.bound, b.bound) == (None, None)


def test_what_joins_two_models_through_a_third_adds_up():
    # 1 against 2 and 2 against 3, never 1 against 3: the difference is a sum, and so is its error, prompt by prompt.
    draw = np.random.default_rng(2)
    first, second = draw.random(20), draw.random(20)
    wins = np.zeros((20, 3, 3))
    wins[:, 0, 1], wins[:, 1, 0], wins[:, 1, 2], wins[:, 2, 1] = first, 1 - first, second, 1 - second
    found = rank(wins, baseline=2)[0].elo
    p, q = first.mean(), second.mean()
    influence = (first - p) / (p * (1 - p)) + (second - q) / (q * (1 - q))
    half = T_19 * influence.std(ddof=1) / math.sqrt(20) * 400 / math.log(10)
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)
    assert found.mean == pytest.approx(1000 + 400 * math.log10(p * q / ((1 - p) * (1 - q))), abs=1e-6)


@pytest.mark.parametrize("prompts", [16, 64])
def test_a_sweep_gives_the_bound_that_its_prompts_allow(prompts):
    rates = np.ones(prompts)
    a, b = rank(two(rates), baseline=1)
    low = cluster_mean(rates, range(prompts), share=True).low
    assert (a.bound, b.bound) == ("at least", None)
    assert a.elo.mean == a.elo.low == pytest.approx(1000 + 400 * math.log10(low / (1 - low)), abs=1e-6)
    assert a.elo.high == math.inf
    (c, d) = rank(two(rates), baseline=0)
    assert (c.bound, d.bound) == (None, "at most")
    assert (d.elo.mean, d.elo.low) == (pytest.approx(2000 - a.elo.mean, abs=1e-6), -math.inf)
    # With 16 prompts and t(.975, 15): n = 16 m (1 - m) / s'^2 with m = 32/33, low = n / (n + t^2).
    if prompts == 16:
        size = 16 * (32 / 33) * (1 / 33) / ((0.5 * 16 / 16.5) / 15.5)
        assert low == pytest.approx(size / (size + T_15**2), abs=1e-6)


def test_a_group_that_is_swept_leaves_the_others_as_they_are():
    draw = np.random.default_rng(3)
    between = draw.integers(0, 3, 20) / 2
    wins = np.zeros((20, 3, 3))
    wins[:, 0, 1], wins[:, 1, 0] = between, 1 - between
    alone = rank(wins[:, :2, :2], baseline=1)
    wins[:, 0, 2] = wins[:, 1, 2] = 1.0  # the third never won
    found = rank(wins, baseline=1)
    assert [one.bound for one in found] == [None, None, "at most"]
    assert found[0].elo.mean == pytest.approx(alone[0].elo.mean, abs=1e-8)
    assert found[0].elo.high == pytest.approx(alone[0].elo.high, abs=1e-6)
    assert found[2].elo.mean < 1000 and math.isinf(found[2].elo.low)
    above = rank(wins, baseline=2)
    assert [one.bound for one in above] == ["at least", "at least", None]


def test_one_prompt_says_nothing_of_a_sweep():
    a, _ = rank(two(np.ones(1)), baseline=1)
    assert (a.elo.mean, a.elo.high, a.bound) == (-math.inf, math.inf, "at least")
    a, _ = rank(two(np.full(1, 0.75)), baseline=1)
    assert (a.elo.mean, a.elo.high) == (pytest.approx(1000 + 400 * math.log10(3)), math.inf)
