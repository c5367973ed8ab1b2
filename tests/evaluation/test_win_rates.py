"""Win rates by hand, and length taken out of data whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.evaluation.seeds import infer
from rlhf_pipeline.evaluation.win_rates import length_controlled_win_rate, prompt_win_rates, win_rate


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_all_pairs_of_a_prompt_by_hand():
    a, b = [[3.0, 1.0], [0.0, 0.0]], [[2.0, 1.0, 0.0], [0.0, 1.0, -1.0]]
    # 3 beats all three; 1 beats 0, loses to 2, ties with 1. Then 0 ties, loses, wins.
    assert prompt_win_rates(a, b) == pytest.approx([4.5 / 6, 3 / 6])
    assert prompt_win_rates(b, a) == pytest.approx([1.5 / 6, 3 / 6])
    assert prompt_win_rates([a, a], [b, b]).shape == (2, 2)
    with pytest.raises(ValueError, match="same seeds and prompts"):
        prompt_win_rates(a, b[:1])


def test_the_win_rate_is_tested_against_one_half():
    a, b = np.array([[3.0], [1.0], [2.0], [5.0]]), np.array([[2.0], [0.0], [1.0], [6.0]])
    found = win_rate(a, b)
    assert (found.estimate.mean, found.estimate.high, found.estimate.n) == (0.75, 1.0, 4)
    # s = 1/2, error 1/4, t = 1 with 3 degrees: p = .391002
    assert found.p == pytest.approx(0.391002, abs=1e-6)
    assert win_rate(a, a).p == 1.0
    assert not found.over_seeds


def test_seeds_pair_with_seeds():
    draw = np.random.default_rng(0)
    a, b = draw.normal(1.0, 1.0, (3, 20, 4)), draw.normal(size=(3, 20, 2))
    found = win_rate(a, b)
    assert found == infer(prompt_win_rates(a, b), null=0.5, share=True)
    assert found.over_seeds and found.estimate.clusters == 3


def test_without_an_effect_of_length_it_is_the_win_rate():
    # Differences +1 and -1 equally often, three of four won at each: theta = logit(3/4), phi = 0.
    a = np.array([[1.0]] * 3 + [[-1.0]] + [[1.0]] * 3 + [[-1.0]])
    length = np.array([[2.0]] * 4 + [[0.0]] * 4)
    found = length_controlled_win_rate(a, np.zeros((8, 1)), length, np.ones((8, 1)))
    assert found.finding.estimate.mean == pytest.approx(0.75, abs=1e-9)
    assert found.phi == pytest.approx(0.0, abs=1e-9)


def test_two_length_differences_by_hand():
    # Won .9 where longer by 2, .6 where shorter by 2; tanh(+-1), sd 2: theta = mean of the logits, phi from half
    # their difference. Without a ridge the fit is exact.
    a = np.concatenate([[1.0] * 9 + [-1.0], [1.0] * 6 + [-1.0] * 4])[:, None]
    length = np.array([3.0] * 10 + [-1.0] * 10)[:, None]
    arguments = (a, np.zeros((20, 1)), length, np.ones((20, 1)))
    found = length_controlled_win_rate(*arguments, ridge=0.0)
    theta, slope = (logit(0.9) + logit(0.6)) / 2, (logit(0.9) - logit(0.6)) / 2
    assert logit(found.finding.estimate.mean) == pytest.approx(theta, abs=1e-8)
    assert found.phi == pytest.approx(slope / math.tanh(1.0), abs=1e-8)
    ridged = length_controlled_win_rate(*arguments)
    assert 0 < found.phi - ridged.phi < 0.01 * found.phi


def test_swapping_the_sides_mirrors_it():
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, 4, (60, 3)), draw.integers(0, 3, (60, 2))
    long, short = draw.integers(3, 20, (60, 3)), draw.integers(1, 15, (60, 2))
    forth, back = (length_controlled_win_rate(*arguments) for arguments in ((a, b, long, short), (b, a, short, long)))
    assert forth.finding.estimate.mean == pytest.approx(1 - back.finding.estimate.mean, abs=1e-9)
    assert forth.finding.estimate.low == pytest.approx(1 - back.finding.estimate.high, abs=1e-9)
    assert forth.phi == pytest.approx(back.phi, abs=1e-9)


def synthetic(draw, prompts: int, theta: float, phi: float, *, samples: int = 4):
    """One comparison per row of the first side, whose mean length is 6 tokens above the other's."""
    gap = np.rint(draw.normal(6.0, 8.0, (prompts, samples)))
    # phi goes with tanh(gap / sd(gap)); sd(gap) is 8 up to sampling error.
    won = draw.random((prompts, samples)) < 1 / (1 + np.exp(-(theta + phi * np.tanh(gap / gap.std()))))
    return np.where(won, 1.0, -1.0), np.zeros((prompts, 1)), gap, np.zeros((prompts, 1))


def test_a_known_effect_is_recovered_and_the_bias_of_length_removed():
    draw = np.random.default_rng(2)
    arguments = synthetic(draw, 20_000, 0.4, 1.5)
    found = length_controlled_win_rate(*arguments, resamples=200)
    assert logit(found.finding.estimate.mean) == pytest.approx(0.4, abs=0.05)  # standard error .013
    assert found.phi == pytest.approx(1.5, abs=0.08)
    assert prompt_win_rates(*arguments[:2]).mean() > 1 / (1 + math.exp(-0.4)) + 0.05
    # Of equal sides of which one is longer, the plain rate prefers the longer one and this one neither.
    equal = synthetic(draw, 2000, 0.0, 1.5)
    assert win_rate(*equal[:2]).estimate.low > 0.6
    estimate = length_controlled_win_rate(*equal).finding.estimate
    assert estimate.low < 0.5 < estimate.high


def test_seeds_have_their_own_fits():
    draw = np.random.default_rng(3)
    parts = [synthetic(draw, 60, 0.3, 1.0) for _ in range(3)]
    stacked = [np.stack(column) for column in zip(*parts)]
    found = length_controlled_win_rate(*stacked, fixed_prompts=True)
    # The unit of length is that of all seeds together: it differs from each one's by a few per cent.
    alone = [length_controlled_win_rate(*part).finding.estimate.mean for part in parts]
    assert found.finding.estimate.mean == pytest.approx(np.mean(alone), abs=0.01)
    assert found.finding.estimate.method == "t over seeds"
    general = length_controlled_win_rate(*stacked)
    assert general.finding.prompt_variance > 0 == found.finding.prompt_variance


@pytest.mark.parametrize(
    "long, short, reason",
    [(5.0, 5.0, "same length difference, 0"), (7.0, 5.0, "same length difference, 2")],
)
def test_undefined_where_all_lengths_agree(long, short, reason):
    found = length_controlled_win_rate([[1.0], [0.0]], [[0.0], [1.0]], [[long]] * 2, [[short]] * 2)
    assert found.finding is None and found.phi is None
    assert reason in found.why_not


def test_undefined_where_equal_length_lies_outside_the_data():
    found = length_controlled_win_rate([[1.0], [0.0]], [[0.0], [1.0]], [[7.0], [8.0]], [[5.0], [5.0]])
    assert found.finding is None and "first side's responses are always longer" in found.why_not
    found = length_controlled_win_rate([[1.0], [0.0]], [[0.0], [1.0]], [[3.0], [2.0]], [[5.0], [5.0]])
    assert "second" in found.why_not


@pytest.mark.filterwarnings("error")
def test_a_side_that_always_wins():
    gap = np.arange(-5.0, 6.0)[:, None]
    found = length_controlled_win_rate(np.ones((11, 1)), np.zeros((11, 1)), gap, np.zeros((11, 1)))
    assert (found.finding.estimate.mean, found.finding.estimate.low) == (1.0, 1.0)


@pytest.mark.filterwarnings("error")
def test_length_that_decides_everything_leaves_the_sides_equal():
    gap = np.array([[-3.0], [-2.0], [-1.0], [1.0], [2.0], [3.0]] * 10)
    found = length_controlled_win_rate(np.sign(gap), np.zeros((60, 1)), gap, np.zeros((60, 1)))
    assert found.finding.estimate.mean == pytest.approx(0.5, abs=1e-6)
    assert 5 < found.phi < 50


def test_lengths_have_to_match():
    with pytest.raises(ValueError, match="a length for each figure"):
        length_controlled_win_rate([[1.0]], [[0.0]], [[1.0, 2.0]], [[1.0]])
