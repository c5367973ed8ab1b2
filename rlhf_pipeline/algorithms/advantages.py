"""Token rewards, advantages and returns from scores and log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.kl import k1


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each response token: r_t = -beta (log pi - log pi_ref)_t, plus the score R at the last token.

    The sum over a response is sum_t r_t = R - beta sum_t k1_t. Source: Ouyang et al. 2022 (InstructGPT), eq. 2;
    Ziegler et al. 2019, eq. 2.

    Args:
        scores: (C,). logprobs, ref_logprobs: (C, R). mask: (C, R) bool, a prefix of ones in each row.
        kl_coef: beta >= 0.

    Returns:
        (C, R); zero where inactive.
    """
    assert scores.ndim == 1 and logprobs.shape == ref_logprobs.shape == mask.shape
    rewards = torch.where(mask, -kl_coef * k1(logprobs, ref_logprobs), torch.zeros_like(logprobs))
    last = mask.sum(1) - 1
    return rewards.scatter_add(1, last[:, None], scores.to(rewards.dtype)[:, None])


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with terminal value 0.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    return_t = A_t + V_t

    Source: Schulman et al. 2016, eq. 16. A response that was cut at its length limit is terminal as well.

    Args:
        rewards, values: (C, R); values[c, t] is V of the prefix that predicts token t.
        mask: (C, R) bool, a prefix of ones in each row.

    Returns:
        advantages and returns, (C, R), zero where inactive.
    """
    assert rewards.shape == values.shape == mask.shape and mask.dtype == torch.bool
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    values, rewards = torch.where(mask, values, zero), torch.where(mask, rewards, zero)
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(running)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Inactive steps have zero rewards and values, so they do not affect the response.
        running = torch.where(mask[:, t], delta + gamma * lam * running, zero)
        next_value = values[:, t]
        advantages[:, t] = running
    return advantages, advantages + values
