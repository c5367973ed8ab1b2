"""Bradley-Terry against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.evaluation.ranking import bradley_terry, rank


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
    assert bradley_terry(np.stack([wins, wins.T])) == pytest.approx(np.stack([true, -true]), abs=1e-9)


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


def test_a_model_that_never_lost_is_held_by_the_ridge():
    s = bradley_terry([[0, 30], [0, 0]])
    # 30 (1 - sigma(2 x)) = .01 x at s = (x, -x)
    assert 30 * (1 - sigma(2 * s[0])) == pytest.approx(0.01 * s[0], abs=1e-9)
    wins = np.repeat(np.array([[[0.0, 1.0], [0.0, 0.0]]]), 60, 0)
    assert rank(wins).separable
    assert not rank(wins * 0.9 + 0.1 * wins.transpose(0, 2, 1)).separable


@pytest.mark.parametrize(
    "wins, message",
    [
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "no chain"),
        ([[0.0]], "k >= 2"),
        ([[0, 1], [-1, 0]], "nothing negative"),
        ([[0, 1, 2], [1, 0, 2]], "expected"),
    ],
)
def test_what_cannot_be_ranked_is_refused(wins, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(wins)


def table(draw, prompts: int, strengths: list[float]) -> np.ndarray:
    rates = np.array([[sigma(a - b) for b in strengths] for a in strengths])
    upper = np.triu(draw.random((prompts, len(rates), len(rates))) < rates, 1).astype(float)
    return upper + np.triu(np.ones_like(upper), 1).transpose(0, 2, 1) * (1 - upper.transpose(0, 2, 1))


def test_elo_of_two_models_by_hand():
    wins = np.zeros((64, 2, 2))
    wins[:48, 0, 1] = wins[48:, 1, 0] = 1.0  # 48 of 64 won: odds of 3
    a, b = (found.estimate for found in rank(wins).elo)
    assert a.mean - b.mean == pytest.approx(400 * math.log10(3), abs=1e-6)
    assert a.mean + b.mean == pytest.approx(2000)
    anchored = rank(wins, baseline=1).elo
    assert anchored[1].estimate.low == anchored[1].estimate.high == 1000.0
    assert anchored[0].estimate.mean == pytest.approx(1000 + 400 * math.log10(3), abs=1e-6)
    # The interval is that of the win rate, read on the scale of the logit: a monotone function keeps percentiles.
    from rlhf_pipeline.evaluation.statistics import cluster_mean

    rate = cluster_mean(wins[:, 0, 1], range(64))
    ends = [1000 + 400 * math.log10(p / (1 - p)) for p in (rate.low, rate.high)]
    assert (anchored[0].estimate.low, anchored[0].estimate.high) == pytest.approx(ends, abs=1.0)


def test_intervals_of_few_prompts_and_of_seeds():
    draw = np.random.default_rng(2)
    wins = table(draw, 20, [0.5, 0.0, -0.5])
    assert {found.estimate.method for found in rank(wins).elo} == {"t"}
    seeds = np.stack([table(draw, 60, [0.5, 0.0, -0.5]) for _ in range(4)])
    found = rank(seeds, fixed_prompts=True)
    expected = [rank(one).elo[0].estimate.mean for one in seeds]
    assert found.elo[0].estimate.mean == pytest.approx(np.mean(expected), abs=1e-8)
    assert found.elo[0].seed_variance == pytest.approx(np.var(expected, ddof=1) / 4, rel=1e-8)
    assert rank(seeds).elo[0].prompt_variance > 0
