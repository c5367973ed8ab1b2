"""KTO: a loss on single responses, each labelled good or bad."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResponseLoss:
    """The loss as a sum over responses, and the implicit rewards beta x log-ratio, (C,), detached."""

    loss: Tensor
    rewards: Tensor


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    z0: float = 0.0,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> ResponseLoss:
    """KTO: sum over responses of w_D [1 - sigma(beta (d - z0))] if desirable, else w_U [1 - sigma(beta (z0 - d))].

        d = log pi(y | x) - log pi_ref(y | x)

    The derivative with respect to d is -w_D beta sigma'(beta (d - z0)) or +w_U beta sigma'(beta (d - z0)); z0 has no
    gradient. With z0 = 0 this is APO-zero, pair by pair. With either z0, a response of the population that is
    undesirable at least as often as desirable (weighted) gets probability 0. Source: Ethayarajh et al. 2024 (KTO), eq.
    7; z0 = 0: D'Oosterlinck et al. 2024 (APO), eq. 7.

    Args:
        logprobs, ref_logprobs: (C,) of whole responses, summed over their tokens, in nats, in at least fp32.
        desirable: (C,) 1 if a response is desirable, 0 if it is undesirable.
        z0: the reference point in nats, see `reference_point`.
        beta: > 0, the steepness of the value function.
    """
    assert logprobs.ndim == 1 and logprobs.shape == ref_logprobs.shape == desirable.shape
    rewards = beta * (logprobs - ref_logprobs)
    ahead = rewards - beta * z0
    good = desirable_weight * (1.0 - torch.sigmoid(ahead))
    bad = undesirable_weight * (1.0 - torch.sigmoid(-ahead))
    return ResponseLoss((desirable * good + (1.0 - desirable) * bad).sum(), rewards.detach())


def reference_point(total: float, count: float) -> float:
    """KTO's z0 = max(0, mean log pi / pi_ref of some responses) in nats, from the sum over them; 0 without any.

    Of responses that the policy sampled it estimates KL(pi || pi_ref), the definition; of the data's responses to other
    prompts it is the paper's estimate (Ethayarajh et al. 2024).
    """
    return max(0.0, total / count) if count else 0.0
