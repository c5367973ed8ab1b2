"""Advantages without a critic: the returns of several responses to one prompt are compared with each other."""

from __future__ import annotations

import torch
from torch import Tensor


def leave_one_out_advantages(returns: Tensor, size: int) -> Tensor:
    """Return minus the mean return of the other responses to the prompt: A_i = G_i - sum_{j != i} G_j / (size - 1).

    The baseline of a response does not depend on it, so the policy gradient is unbiased. Source: Ahmadian et al. 2024
    (RLOO), section 3.2; Kool et al. 2019.

    Args:
        returns: (C,) G, the score minus beta times the sum of the log-ratios, in groups of neighbours.
        size: responses to each prompt, >= 2.

    Returns:
        (C,)
    """
    groups = returns.view(-1, size)
    others = (groups.sum(1, keepdim=True) - groups) / (size - 1)
    return (groups - others).flatten()


def group_advantages(returns: Tensor, size: int, *, scale: bool) -> Tensor:
    """Return minus the mean return of all responses to the prompt: A_i = G_i - mean(G) [/ (sd(G) + 1e-4)].

    The mean has the response itself in it, so the expected step is (size - 1) / size of that of RLOO. Source: Shao et
    al. 2024 (GRPO), section 4.1.2.

    Args:
        returns: (C,), in groups of neighbours. size: responses to each prompt, >= 2.
        scale: divide by the standard deviation of the group's returns, with size - 1 in its denominator (TRL).

    Returns:
        (C,)
    """
    groups = returns.view(-1, size)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def to_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Values of responses (C,) at each of their tokens, (C, R); zero where inactive."""
    assert values.ndim == 1 and mask.dtype == torch.bool
    return torch.where(mask, values[:, None], torch.zeros((), dtype=values.dtype, device=values.device))
