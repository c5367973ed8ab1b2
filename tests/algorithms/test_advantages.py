"""Token rewards and GAE against brute-force sums."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.advantages import gae, token_rewards

LENGTHS = [4, 1, 3, 2]


def ragged(seed: int = 0, filler: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two (4, 5) matrices of random numbers, `filler` behind each row's length, and the mask."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    one, two = (torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    return torch.where(mask, one, filler), torch.where(mask, two, filler), mask


def brute_force(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k} with V = 0 behind the end."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, after)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize("filler", [0.0, math.nan])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.8), (0.0, 0.5)])
def test_gae_of_ragged_lengths_equals_the_brute_force_sum(gamma, lam, filler):
    rewards, values, mask = ragged(filler=filler)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = brute_force(r, v, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx([a + b for a, b in zip(expected, v)], abs=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_the_return_minus_v(gamma):
    rewards, values, mask = ragged(1)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            total = sum(gamma ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert returns[row, t].item() == pytest.approx(total, abs=1e-12)
            assert advantages[row, t].item() == pytest.approx(total - values[row, t].item(), abs=1e-12)


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 2.0]])
    values = torch.tensor([[0.5, 1.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[2.0, 1.0]]  # 1 + 1 - .5 + .5 x 1; 2 - 1
    assert returns.tolist() == [[2.5, 2.0]]


def test_the_defaults_are_gamma_1_and_lambda_95():
    rewards, values, mask = ragged(2)
    for one, other in zip(gae(rewards, values, mask), gae(rewards, values, mask, gamma=1.0, lam=0.95)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("columns", [1, 4])
def test_padding_changes_no_advantage(columns):
    rewards, values, mask = ragged(3)
    wide = [torch.nn.functional.pad(x, (0, columns), value=50.0) for x in (rewards, values)]
    advantages, returns = gae(*wide, torch.nn.functional.pad(mask, (0, columns)))
    for found, expected in zip((advantages, returns), gae(rewards, values, mask)):
        assert torch.equal(found[:, :5], expected)
        assert not found[:, 5:].any()


@pytest.mark.parametrize("filler", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_token_rewards_sum_to_the_score_minus_beta_kl(kl_coef, filler):
    logprobs, ref, mask = ragged(4, filler)
    scores = torch.tensor([1.5, -2.0, 0.25, 3.0], dtype=torch.float64)
    rewards = token_rewards(scores, logprobs, ref, mask, kl_coef=kl_coef)
    for row, length in enumerate(LENGTHS):
        kl = sum(logprobs[row, t].item() - ref[row, t].item() for t in range(length))
        assert rewards[row].sum().item() == pytest.approx(scores[row].item() - kl_coef * kl, abs=1e-12)
        assert not rewards[row, length:].any()


def test_the_score_stands_once_at_the_last_response_token():
    logprobs, ref, mask = ragged(5)
    zero = token_rewards(torch.zeros(4, dtype=torch.float64), logprobs, ref, mask, kl_coef=0.5)
    torch.testing.assert_close(zero, torch.where(mask, -0.5 * (logprobs - ref), 0.0), rtol=0, atol=1e-15)
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    difference = token_rewards(scores, logprobs, ref, mask, kl_coef=0.5) - zero
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        expected[row, length - 1] = scores[row]
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-14)


def test_scores_of_another_precision_are_cast():
    logprobs, ref, mask = ragged(6)
    assert token_rewards(torch.ones(4), logprobs, ref, mask, kl_coef=1.0).dtype == torch.float64
