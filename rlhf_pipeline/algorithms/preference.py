"""Losses on preferences, as sums over pairs; and the statistics that are logged beside them."""

from __future__ import annotations

from collections.abc import Callable
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
    """Sum over pairs and, per completion, the implicit rewards beta x log-ratio (detached, (P,))."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def smoothed_target(target: Tensor | None, label_smoothing: float) -> Tensor | None:
    """Probability of the label that a labeller who errs at rate eps would give: p (1 - eps) + (1 - p) eps.

    Args:
        target: (P,) p, the probability that the chosen response is preferred; None: the label is certain.
        label_smoothing: eps in [0, .5).
    """
    if label_smoothing == 0.0:
        return target
    target = torch.ones((), dtype=torch.float64) if target is None else target  # no dimension: it widens no dtype
    return target * (1.0 - label_smoothing) + (1.0 - target) * label_smoothing


def _log_ratios(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
) -> tuple[Tensor, Tensor]:
    assert chosen_logprobs.ndim == 1 and chosen_logprobs.shape == rejected_logprobs.shape
    assert chosen_logprobs.shape == ref_chosen_logprobs.shape == ref_rejected_logprobs.shape
    return chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs


def dpo_sigmoid_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    target: Tensor | None = None,
) -> PreferenceLoss:
    """DPO: sum over pairs of -p log sigma(h) - (1 - p) log sigma(-h).

        h = beta [(log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l)]

    Its gradient is (sigma(h) - p) grad h. Source: Rafailov et al. 2023, eq. 7, with p = 1; with p = 1 - eps it is
    the conservative loss of Mitchell 2023 ("A note on DPO with noisy preferences & relationship to IPO").

    Args:
        each (P,): log-probabilities of whole responses, summed over their tokens, in at least fp32.
        beta: > 0, strength of the KL term of the objective that this loss optimises.
        target: (P,) or a scalar, the probability p that the chosen response is preferred; None: 1.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = beta * chosen, beta * rejected
    h = chosen - rejected
    losses = -logsigmoid(h) if target is None else -target * logsigmoid(h) - (1.0 - target) * logsigmoid(-h)
    return PreferenceLoss(losses.sum(), chosen.detach(), rejected.detach())


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    target: Tensor | None = None,
) -> PreferenceLoss:
    """IPO: sum over pairs of p (h - 1 / (2 tau))^2 + (1 - p) (h + 1 / (2 tau))^2, tau = beta.

        h = (log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l),    free of beta

    Its minimiser, with both responses drawn from mu, is pi_ref exp(E_{y' ~ mu} p(y > y') / tau) / Z: it is bounded
    however certain the labels are. Source: Azar et al. 2023, eq. 17, with p = 1. The paper's log-probabilities are
    sums over a response's tokens; the loss that TRL calls ipo takes means over them.

    Args: as of `dpo_sigmoid_loss`. The implicit rewards are beta x log-ratio as there, for comparison: the loss
        itself does not see them.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    h, aim = chosen - rejected, 1.0 / (2.0 * beta)
    losses = (h - aim) ** 2 if target is None else target * (h - aim) ** 2 + (1.0 - target) * (h + aim) ** 2
    return PreferenceLoss(losses.sum(), (beta * chosen).detach(), (beta * rejected).detach())


@dataclass(frozen=True)
class Objective:
    """A preference loss, and what it has to be given.

    loss: (chosen, rejected, ref_chosen, ref_rejected, *, beta, target) -> PreferenceLoss.
    needs_reference: whether it reads the reference's log-probabilities.
    length_normalised: whether its log-probabilities are means over a response's tokens instead of sums.
    """

    loss: Callable[..., PreferenceLoss]
    needs_reference: bool = True
    length_normalised: bool = False


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(dpo_sigmoid_loss),
    "ipo": Objective(ipo_loss),
    "ipo_mean": Objective(ipo_loss, length_normalised=True),
}


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen one scores higher, one half on ties, else 0; shape (P,)."""
    assert chosen.shape == rejected.shape
    return (chosen > rejected).to(torch.float64) + 0.5 * (chosen == rejected).to(torch.float64)
