"""PPO's two losses, as sums over the active tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.kl import k2
from rlhf_pipeline.algorithms.masked import masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over active tokens. loss: differentiable; the rest are detached."""

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor
    ratio: Tensor
    ratio_square: Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, cliprange: float
) -> PolicyLoss:
    """Clipped surrogate: sum over tokens of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old.

    Source: Schulman et al. 2017, eq. 7 (with the sign of a loss).

    Args:
        logprobs, old_logprobs, advantages: (C, R); only `logprobs` carries a gradient.
        mask: (C, R) bool.
        cliprange: eps > 0.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape
    # Inactive entries may hold NaN: they are neutralised before, not after, the exponential.
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    advantages = torch.where(mask, advantages, torch.zeros_like(advantages))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    with torch.no_grad():
        is_clipped = (clipped > unclipped) & mask
        approx_kl = masked_sum(k2(logprobs, old_logprobs), mask)
        ratio_sum, ratio_square = masked_sum(ratio, mask), masked_sum(ratio**2, mask)
    return PolicyLoss(
        masked_sum(torch.maximum(unclipped, clipped), mask),
        is_clipped.sum().to(ratio.dtype),
        approx_kl,
        ratio_sum,
        ratio_square,
    )


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Value loss 0.5 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2), summed over tokens.

    Source: the PPO reference implementation (baselines, ppo2), as analysed by Huang et al. 2022, detail 9.

    Args:
        values: (C, R), carries the gradient. old_values, returns: (C, R). mask: (C, R) bool.

    Returns:
        the loss sum and the number of clipped tokens.
    """
    assert values.shape == old_values.shape == returns.shape == mask.shape
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    values, old_values, returns = (torch.where(mask, x, zero) for x in (values, old_values, returns))
    limited = torch.maximum(torch.minimum(values, old_values + cliprange_value), old_values - cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (limited - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(unclipped, clipped), mask)
    return loss, ((clipped > unclipped) & mask).sum().to(values.dtype)
