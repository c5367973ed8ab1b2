"""Losses on preferences, as sums over pairs; and the statistics that are logged beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the preferences: sum over pairs of -log sigma(r_w - r_l - margin).

    Source: Ouyang et al. 2022 (InstructGPT), eq. 1, with K = 2; the margin: Touvron et al. 2023 (Llama 2), eq. 2.

    Args:
        chosen_scores, rejected_scores: (P,), one score per pair. margin: (P,) or None.
    """
    assert chosen_scores.ndim == 1 and chosen_scores.shape == rejected_scores.shape
    difference = chosen_scores - rejected_scores
    return -logsigmoid(difference if margin is None else difference - margin).sum()


def centering_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Auxiliary loss that keeps scores near zero: sum over pairs of (r_w + r_l)^2. Eisenstein et al. 2023, eq. 4."""
    assert chosen_scores.shape == rejected_scores.shape
    return ((chosen_scores + rejected_scores) ** 2).sum()


@dataclass(frozen=True)
class PreferenceLoss:
    """Sums over pairs and, per completion, the implicit rewards (detached, (P,))."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_sigmoid_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """DPO: sum over pairs of -log sigma(h), h = beta [(log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l)].

    Its gradient is -beta sigma(-h) [grad log pi(y_w) - grad log pi(y_l)]. Source: Rafailov et al. 2023, eq. 7.

    Args:
        each (P,): log-probabilities of whole responses, summed over their tokens, in at least fp32.
        beta: > 0, strength of the KL term of the objective that this loss optimises.
    """
    assert chosen_logprobs.ndim == 1
    assert chosen_logprobs.shape == rejected_logprobs.shape == ref_chosen_logprobs.shape
    chosen = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected = beta * (rejected_logprobs - ref_rejected_logprobs)
    return PreferenceLoss(-logsigmoid(chosen - rejected).sum(), chosen.detach(), rejected.detach())


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen one scores higher, one half on ties, else 0; shape (P,)."""
    assert chosen.shape == rejected.shape
    return (chosen > rejected).to(torch.float64) + 0.5 * (chosen == rejected).to(torch.float64)
