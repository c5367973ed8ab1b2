"""Losses of PPO and GRPO, as sums over active tokens, and importance weights of tokens of another policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.kl import k2, k3
from rlhf_pipeline.algorithms.masked import masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over active tokens. loss is differentiable; the other fields are detached."""

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor
    ratio: Tensor
    ratio_square: Tensor


@dataclass(frozen=True)
class ImportanceWeights:
    """weights: (C, R), detached, 1 at inactive entries.

    Sums over active tokens: truncated, the number of weights at the cap; difference, |log pi_old - log mu| in nats.
    """

    weights: Tensor
    truncated: Tensor
    difference: Tensor


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float
) -> ImportanceWeights:
    """Truncated importance weights of tokens: w = min(pi_old / mu, cap); mu is the policy that sampled them.

    Each weight corrects its own token. With an infinite cap the expected weighted step is that of tokens sampled from
    pi_old after prefixes sampled from mu; the distribution of the prefixes is not corrected.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (TIS).

    Args:
        old_logprobs, sampler_logprobs: (C, R). mask: (C, R) bool. cap: > 0, may be infinite.
    """
    assert old_logprobs.shape == sampler_logprobs.shape == mask.shape
    log_ratio = torch.where(mask, old_logprobs - sampler_logprobs, torch.zeros_like(old_logprobs))
    ratio = log_ratio.exp()
    weights = torch.where(mask, ratio.clamp_max(cap), torch.ones_like(ratio))
    truncated = masked_sum((ratio > cap).to(ratio.dtype), mask)
    return ImportanceWeights(weights, truncated, masked_sum(log_ratio.abs(), mask))


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate: sum over tokens of w max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old.

    Source: Schulman et al. 2017, eq. 7 (with the sign of a loss); w: `importance_weights`.

    Args:
        logprobs, old_logprobs, advantages: (C, R); only `logprobs` carries a gradient.
        mask: (C, R) bool.
        cliprange: eps > 0; infinite: rho is not clipped.
        weights: (C, R), w > 0; None: 1. Only the loss uses them, not the other sums.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape
    if weights is not None:
        assert weights.shape == mask.shape
        advantages = weights.detach() * advantages  # w max(a, b) = max(w a, w b)
    # Inactive entries may hold NaN, so they are masked before the exponential, not after it.
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


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """KL to the reference in the loss: sum over tokens of w k3, k3 = pi_ref / pi - 1 - log(pi_ref / pi).

    Its expected gradient at the policy that sampled is that of KL(pi_ref || pi) of each token's distribution, and a
    token does not pay for later tokens, so the optimum is not pi_ref exp(r / beta). Source: Shao et al. 2024, eq. 4.

    Args:
        logprobs, ref_logprobs: (C, R); only `logprobs` carries a gradient. mask: (C, R) bool.
        weights: (C, R), w > 0; None: 1.
    """
    assert logprobs.shape == ref_logprobs.shape == mask.shape
    # Inactive entries may hold NaN, so they are masked before the exponential.
    policy, reference = (torch.where(mask, x, torch.zeros_like(x)) for x in (logprobs, ref_logprobs))
    tokens = k3(policy, reference)
    return masked_sum(tokens if weights is None else weights.detach() * tokens, mask)


def response_kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """KL to the reference in the loss, by responses: sum over them of w (sum_t log pi_t - log pi_ref_t)^2 / 2.

    Its expected gradient at the policy that sampled is that of KL(pi || pi_ref) over whole responses, so the optimum
    stays pi_ref exp(r / beta) / Z. Source: J. Schulman, "Approximating KL divergence" (2020), k2.

    Args:
        logprobs, ref_logprobs: (C, R); only `logprobs` carries a gradient. mask: (C, R) bool.
        weights: (C, R), w > 0, the same for all tokens of a response; None: 1.
    """
    assert logprobs.shape == ref_logprobs.shape == mask.shape
    squares = k2(masked_sum(logprobs, mask, 1), masked_sum(ref_logprobs, mask, 1))
    return (squares if weights is None else weights[:, 0].detach() * squares).sum()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss: sum over tokens of 0.5 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2).

    Source: the PPO reference implementation (baselines, ppo2), as analysed by Huang et al. 2022, detail 9.

    Args:
        values: (C, R), carries the gradient. old_values, returns: (C, R). mask: (C, R) bool.
        cliprange_value: eps > 0; infinite: V is not clipped.

    Returns:
        the sum of the loss and the number of clipped tokens.
    """
    assert values.shape == old_values.shape == returns.shape == mask.shape
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    values, old_values, returns = (torch.where(mask, x, zero) for x in (values, old_values, returns))
    limited = torch.maximum(torch.minimum(values, old_values + cliprange_value), old_values - cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (limited - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(unclipped, clipped), mask)
    return loss, ((clipped > unclipped) & mask).sum().to(values.dtype)
