"""Win rates by hand, and length taken out of data whose law is known."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from rlhf_pipeline.evaluation.seeds import infer
from rlhf_pipeline.evaluation.win_rates import length_controlled_win_rate, prompt_win_rates, tie_share, win_rate
from rlhf_pipeline.rollout.sampler import pick


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_all_pairs_of_a_prompt_by_hand():
    a, b = [[3.0, 1.0], [0.0, 0.0]], [[2.0, 1.0, 0.0], [0.0, 1.0, -1.0]]
    # 3 beats all three; 1 beats 0, loses to 2, ties with 1. Then 0 ties, loses, wins.
    assert prompt_win_rates(a, b, coupled=False) == pytest.approx([4.5 / 6, 3 / 6])
    assert prompt_win_rates(b, a, coupled=False) == pytest.approx([1.5 / 6, 3 / 6])
    assert prompt_win_rates([a, a], [b, b], coupled=False).shape == (2, 2)
    with pytest.raises(ValueError, match="same seeds and prompts"):
        prompt_win_rates(a, b[:1], coupled=False)


def test_the_win_rate_is_tested_against_one_half():
    a, b = np.array([[3.0], [1.0], [2.0], [5.0]]), np.array([[2.0], [0.0], [1.0], [6.0]])
    found = win_rate(a, b, coupled=False)
    assert (found.estimate.mean, found.estimate.n, found.estimate.method) == (0.75, 4, "wilson")
    # Squares 3/4. Three of four prompts agree: w = 9/16/2 of a prompt more at 0, which adds w 4 / (4 + w) x 9/16; over
    # 3 + w. m = 3 / (4 + w). Against one half: t = (1/4) / sqrt(1/4 / n) = sqrt(n) / 2, with 3 degrees.
    w = 9 / 32
    size = 4 * (3 / (4 + w)) * ((1 + w) / (4 + w)) / ((0.75 + w * 4 / (4 + w) * 9 / 16) / (3 + w))
    t = math.sqrt(size) / 2
    tail = math.atan(t / math.sqrt(3)) + (t / math.sqrt(3)) / (1 + t * t / 3)
    assert found.p == pytest.approx(1 - 2 / math.pi * tail, abs=1e-9)
    assert win_rate(a, a, coupled=False).p == 1.0


def coupled_draws(a: np.ndarray, b: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All outcomes of `count` coupled draws of two policies of one token: tokens of each (N, count), probability (N,).

    The same uniform number picks both tokens, so between neighbouring ends of the cumulative distributions nothing
    changes: these intervals are the outcomes.
    """
    ends = np.unique(np.round(np.concatenate([[0.0], a.cumsum(), b.cumsum()]), 12))
    middle, width = torch.tensor((ends[1:] + ends[:-1]) / 2), np.diff(ends)
    tokens = []
    for law in (a, b):
        logits = torch.tensor(law).log().expand(len(middle), -1)
        tokens.append(pick(logits, middle)[0].numpy())
    place = np.array(list(product(range(len(middle)), repeat=count)))
    return tokens[0][place], tokens[1][place], width[place].prod(1)


COUPLED = {
    "any two": (np.array([0.1, 0.4, 0.3, 0.2]), np.array([0.35, 0.15, 0.25, 0.25]), [0.0, 2.0, 1.0, 1.0]),
    "one ahead of its twin": (np.full(5, 0.2), np.array([1e-9, 0.2, 0.2, 0.2, 0.4 - 1e-9]), [4.0, 3.0, 2.0, 1.0, 0.0]),
}


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("world", COUPLED)
def test_pairs_of_one_index_are_left_out_and_the_rate_is_that_of_independent_responses(world, count):
    a, b, worth = COUPLED[world]
    worth = np.array(worth)
    one, other, probability = coupled_draws(a, b, count)
    assert probability.sum() == pytest.approx(1.0, abs=1e-12)
    gap = worth[:, None] - worth[None, :]
    truth = a @ ((gap > 0) + 0.5 * (gap == 0)) @ b
    ties = a @ (gap == 0) @ b
    found = prompt_win_rates(worth[one], worth[other], coupled=True)
    assert probability @ found == pytest.approx(truth, abs=1e-12)
    tied = [tie_share(worth[x][None], worth[y][None], coupled=True) for x, y in zip(one, other)]
    assert probability @ np.array(tied) == pytest.approx(ties, abs=1e-12)
    # With the pairs of one index the expectation is off by (P(a_i > b_i) - P(a > b)) / count.
    same = worth[one[:, 0]] - worth[other[:, 0]]
    together = probability @ ((same > 0) + 0.5 * (same == 0))
    naive = probability @ prompt_win_rates(worth[one], worth[other], coupled=False)
    assert naive == pytest.approx(truth + (together - truth) / count, abs=1e-12)
    assert abs(naive - truth) > 0.01


def test_one_coupled_response_says_nothing():
    with pytest.raises(ValueError, match="sample at least 2"):
        win_rate([[1.0], [2.0]], [[0.0], [3.0]], coupled=True)
    with pytest.raises(ValueError, match="as many on coupled sides"):
        prompt_win_rates([[1.0, 2.0]], [[0.0]], coupled=True)
    assert prompt_win_rates([[1.0]], [[0.0]], coupled=False) == [1.0]  # demonstrations: an independent side


def test_equal_length_leaves_out_the_same_pairs():
    draw = np.random.default_rng(5)
    a, b = draw.integers(0, 4, (2, 30, 3)).astype(float)
    long, short = draw.integers(1, 12, (2, 30, 3)).astype(float)
    found = length_controlled_win_rate(a, b, long, short, coupled=True, resamples=50)
    apart = [(i, j) for i in range(3) for j in range(3) if i != j]
    outcome = np.stack([np.sign(a[:, i] - b[:, j]) for i, j in apart], 1)
    gap = np.stack([long[:, i] - short[:, j] for i, j in apart], 1)
    nothing = np.zeros((30, 1))
    expected = length_controlled_win_rate(outcome, nothing, gap, nothing, coupled=False, resamples=50)
    assert found.phi == pytest.approx(expected.phi, abs=1e-9)
    assert found.inference.estimate.mean == pytest.approx(expected.inference.estimate.mean, abs=1e-9)


def test_seeds_pair_with_seeds():
    draw = np.random.default_rng(0)
    a, b = draw.normal(1.0, 1.0, (3, 20, 4)), draw.normal(size=(3, 20, 2))
    found = win_rate(a, b, coupled=False)
    assert found == infer(prompt_win_rates(a, b, coupled=False), null=0.5, share=True)
    assert found.estimate.method == "wilson over seeds and prompts" and found.estimate.clusters == 3


def test_without_an_effect_of_length_it_is_the_win_rate():
    # Differences +1 and -1 equally often, three of four won at each: theta = logit(3/4), phi = 0.
    a = np.array([[1.0]] * 3 + [[-1.0]] + [[1.0]] * 3 + [[-1.0]])
    length = np.array([[2.0]] * 4 + [[0.0]] * 4)
    found = length_controlled_win_rate(a, np.zeros((8, 1)), length, np.ones((8, 1)), coupled=False)
    assert found.inference.estimate.mean == pytest.approx(0.75, abs=1e-9)
    assert found.phi == pytest.approx(0.0, abs=1e-9)


def test_two_length_differences_by_hand():
    # Won .9 where longer by 2, .6 where shorter by 2; tanh(+-1), sd 2: theta = mean of the logits, phi from half
    # their difference. Without a ridge the fit is exact.
    a = np.concatenate([[1.0] * 9 + [-1.0], [1.0] * 6 + [-1.0] * 4])[:, None]
    length = np.array([3.0] * 10 + [-1.0] * 10)[:, None]
    arguments = (a, np.zeros((20, 1)), length, np.ones((20, 1)))
    found = length_controlled_win_rate(*arguments, coupled=False, ridge=0.0)
    theta, slope = (logit(0.9) + logit(0.6)) / 2, (logit(0.9) - logit(0.6)) / 2
    assert logit(found.inference.estimate.mean) == pytest.approx(theta, abs=1e-8)
    assert found.phi == pytest.approx(slope / math.tanh(1.0), abs=1e-8)
    ridged = length_controlled_win_rate(*arguments, coupled=False)
    assert 0 < found.phi - ridged.phi < 0.01 * found.phi


def test_swapping_the_sides_mirrors_it():
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, 4, (60, 3)), draw.integers(0, 3, (60, 2))
    long, short = draw.integers(3, 20, (60, 3)), draw.integers(1, 15, (60, 2))
    forth, back = (
        length_controlled_win_rate(*arguments, coupled=False)
        for arguments in ((a, b, long, short), (b, a, short, long))
    )
    assert forth.inference.estimate.mean == pytest.approx(1 - back.inference.estimate.mean, abs=1e-9)
    assert forth.inference.estimate.low == pytest.approx(1 - back.inference.estimate.high, abs=1e-9)
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
    found = length_controlled_win_rate(*arguments, coupled=False, resamples=200)
    assert logit(found.inference.estimate.mean) == pytest.approx(0.4, abs=0.05)  # standard error .013
    assert found.phi == pytest.approx(1.5, abs=0.08)
    assert prompt_win_rates(*arguments[:2], coupled=False).mean() > 1 / (1 + math.exp(-0.4)) + 0.05
    # Of equal sides of which one is longer, the plain rate prefers the longer one and this one neither.
    equal = synthetic(draw, 2000, 0.0, 1.5)
    assert win_rate(*equal[:2], coupled=False).estimate.low > 0.6
    estimate = length_controlled_win_rate(*equal, coupled=False).inference.estimate
    assert estimate.low < 0.5 < estimate.high


def test_seeds_have_their_own_fits():
    draw = np.random.default_rng(3)
    parts = [synthetic(draw, 60, 0.3, 1.0) for _ in range(3)]
    stacked = [np.stack(column) for column in zip(*parts)]
    found = length_controlled_win_rate(*stacked, coupled=False)
    # The unit of length is that of all seeds together: it differs from each one's by a few per cent.
    alone = [length_controlled_win_rate(*part, coupled=False).inference.estimate.mean for part in parts]
    assert found.inference.estimate.mean == pytest.approx(np.mean(alone), abs=0.01)
    assert found.inference.estimate.method == "wilson over seeds and prompts"


@pytest.mark.parametrize(
    "long, short, reason",
    [(5.0, 5.0, "same length difference, 0"), (7.0, 5.0, "same length difference, 2")],
)
def test_undefined_where_all_lengths_agree(long, short, reason):
    found = length_controlled_win_rate([[1.0], [0.0]], [[0.0], [1.0]], [[long]] * 2, [[short]] * 2, coupled=False)
    assert found.inference is None and found.phi is None
    assert reason in found.why_not


def test_undefined_where_equal_length_lies_outside_the_data():
    found = length_controlled_win_rate([[1.0], [0.0]], [[0.0], [1.0]], [[7.0], [8.0]], [[5.0], [5.0]], coupled=False)
    assert found.inference is None and "first side's responses are always longer" in found.why_not
    found = length_controlled_win_rate([[1.0], [0.0]], [[0.0], [1.0]], [[3.0], [2.0]], [[5.0], [5.0]], coupled=False)
    assert "second" in found.why_not


@pytest.mark.filterwarnings("error")
def test_a_side_that_always_wins():
    gap = np.arange(-5.0, 6.0)[:, None]
    found = length_controlled_win_rate(np.ones((11, 1)), np.zeros((11, 1)), gap, np.zeros((11, 1)), coupled=False)
    found = found.inference.estimate
    # Eleven prompts that all agree and half a one that does not: n = 11 m (1 - m) / s'^2 with m = 22/23.
    middle = 11 / 11.5
    size = 11 * middle * (1 - middle) / ((0.5 * 11 / 11.5) / 10.5)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(size / (size + 2.228139**2), abs=1e-6)  # t(.975, 10)


@pytest.mark.filterwarnings("error")
def test_length_that_decides_everything_leaves_the_sides_equal():
    gap = np.array([[-3.0], [-2.0], [-1.0], [1.0], [2.0], [3.0]] * 10)
    found = length_controlled_win_rate(np.sign(gap), np.zeros((60, 1)), gap, np.zeros((60, 1)), coupled=False)
    assert found.inference.estimate.mean == pytest.approx(0.5, abs=1e-6)
    assert 5 < found.phi < 50


def test_lengths_have_to_match():
    with pytest.raises(ValueError, match="a length for each figure"):
        length_controlled_win_rate([[1.0]], [[0.0]], [[1.0, 2.0]], [[1.0]], coupled=False)
