"""Losses on preferences, as sums over pairs or rankings, and the statistics that are logged with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_pipeline.algorithms.reference_free import cpo_losses, orpo_losses, simpo_losses


def _total(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over pairs of weight x loss. weight: (P,); None: 1 each."""
    assert weight is None or weight.shape == losses.shape
    return losses.sum() if weight is None else (weight * losses).sum()


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the preferences: sum over pairs of -weight log sigma(r_w - r_l - margin).

    Source: Ouyang et al. 2022 (InstructGPT), eq. 1, where each pair of a prompt with K completions has the weight
    1 / C(K, 2), or 1 / (untied pairs) if some are tied; for the margin, Touvron et al. 2023 (Llama 2), eq. 2.

    Args:
        chosen_scores, rejected_scores: (P,). margin: (P,) or None. weight: (P,); None: 1 each.
    """
    assert chosen_scores.ndim == 1 and chosen_scores.shape == rejected_scores.shape
    difference = chosen_scores - rejected_scores
    return _total(-logsigmoid(difference if margin is None else difference - margin), weight)


def centering_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Auxiliary loss that keeps scores near zero: sum over pairs of weight (r_w + r_l)^2.

    Source: Eisenstein et al. 2023, eq. 4. Args: see `bradley_terry_loss`.
    """
    assert chosen_scores.shape == rejected_scores.shape
    return _total((chosen_scores + rejected_scores) ** 2, weight)


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss as a sum over pairs, and the implicit rewards beta x log-ratio of both sides, (P,) each, detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def smoothed_target(target: Tensor | None, label_smoothing: float) -> Tensor | None:
    """Probability that a labeller with error rate eps prefers the chosen response: p (1 - eps) + (1 - p) eps.

    Args:
        target: (P,) p, the probability that the chosen response is preferred; None: the label is certain.
        label_smoothing: eps in [0, .5).
    """
    if label_smoothing == 0.0:
        return target
    target = torch.ones((), dtype=torch.float64) if target is None else target  # no dimension: it widens no dtype
    return target * (1.0 - label_smoothing) + (1.0 - target) * label_smoothing


def unflipped_target(target: Tensor | None, label_smoothing: float) -> Tensor | None:
    """Target of robust DPO for labels of which a share eps was flipped: (p - eps) / (1 - 2 eps).

    With it the sigmoid loss is [(1 - eps) l(h) - eps l(-h)] / (1 - 2 eps), l(h) = -log sigma(h). Its mean over the
    flips is the loss of the labels before they were flipped, so its optimum is DPO's. For a certain label the target is
    above 1, so the loss of a single pair has no minimum. Source: Chowdhury et al. 2024 (robust DPO).

    Args: see `smoothed_target`.
    """
    if label_smoothing == 0.0:
        return target
    target = torch.ones((), dtype=torch.float64) if target is None else target
    return (target - label_smoothing) / (1.0 - 2.0 * label_smoothing)


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
    weight: Tensor | None = None,
    margin: Tensor | None = None,
) -> PreferenceLoss:
    """DPO: weighted sum over pairs of -p log sigma(h) - (1 - p) log sigma(-h).

        h = beta [(log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l)] - margin

    The gradient of a pair is (sigma(h) - p) grad h. Source: Rafailov et al. 2023, eq. 7, with p = 1; with p = 1 - eps
    it is the conservative loss of Mitchell 2023 ("A note on DPO with noisy preferences & relationship to IPO"). The
    margin is the offset of Amini et al. 2024 ("Direct Preference Optimization with an Offset").

    Args:
        *_logprobs: (P,) log-probabilities of whole responses, summed over their tokens, in nats, in at least fp32.
        beta: > 0, strength of the KL term of the objective that this loss optimises.
        target: (P,) or a scalar, the probability p that the chosen response is preferred; None: 1.
        weight: (P,); None: 1 each.
        margin: (P,) in units of the implicit rewards; None: 0.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = beta * chosen, beta * rejected
    h = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -logsigmoid(h) if target is None else -target * logsigmoid(h) - (1.0 - target) * logsigmoid(-h)
    return PreferenceLoss(_total(losses, weight), chosen.detach(), rejected.detach())


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    target: Tensor | None = None,
    weight: Tensor | None = None,
) -> PreferenceLoss:
    """IPO: weighted sum over pairs of p (h - 1 / (2 tau))^2 + (1 - p) (h + 1 / (2 tau))^2, with tau = beta.

        h = (log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l),    without beta

    If both responses are drawn from mu, the minimiser is pi_ref exp(E_{y' ~ mu} p(y > y') / tau) / Z, which is bounded
    even for certain labels. Source: Azar et al. 2023, eq. 17, with p = 1. The paper sums log-probabilities over a
    response's tokens; the loss that TRL calls ipo takes their mean.

    Args: see `dpo_sigmoid_loss`. The implicit rewards are beta x log-ratio, as there, for comparison; the loss does not
        use them.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    h, aim = chosen - rejected, 1.0 / (2.0 * beta)
    losses = (h - aim) ** 2 if target is None else target * (h - aim) ** 2 + (1.0 - target) * (h + aim) ** 2
    return PreferenceLoss(_total(losses, weight), (beta * chosen).detach(), (beta * rejected).detach())


def hinge_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    target: Tensor | None = None,
    weight: Tensor | None = None,
) -> PreferenceLoss:
    """Hinge loss: weighted sum over pairs of p max(0, 1 - h) + (1 - p) max(0, 1 + h), with h of `dpo_sigmoid_loss`.

    It asks for a margin of 1 in the preferred order, and ignores how much it is preferred: at its minimum all margins h
    are whole numbers, and over two responses the margin is 1 for every p > 1/2. Source: Zhao et al. 2023
    (SLiC-HF); Liu et al. 2023 (RSO).

    Args: see `dpo_sigmoid_loss`.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = beta * chosen, beta * rejected
    h = chosen - rejected
    losses = relu(1.0 - h) if target is None else target * relu(1.0 - h) + (1.0 - target) * relu(1.0 + h)
    return PreferenceLoss(_total(losses, weight), chosen.detach(), rejected.detach())


def apo_zero_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    target: Tensor | None = None,
    weight: Tensor | None = None,
) -> PreferenceLoss:
    """APO-zero: weighted sum over pairs of (2 p - 1) [sigma(s_l) - sigma(s_w)] + 1, s = beta (log pi - log pi_ref).

    With p = 1 this is (1 - sigma(s_w)) + sigma(s_l): it raises the chosen response and lowers the rejected one, each by
    itself. Its minimiser is not pi_ref exp(r / beta): responses that lose more often than they win get probability 0.
    Source: D'Oosterlinck et al. 2024 (Anchored Preference Optimization), eq. 7, with p = 1.

    Args: see `dpo_sigmoid_loss`.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = beta * chosen, beta * rejected
    fall = torch.sigmoid(rejected) - torch.sigmoid(chosen)
    losses = 1.0 + (fall if target is None else (2.0 * target - 1.0) * fall)
    return PreferenceLoss(_total(losses, weight), chosen.detach(), rejected.detach())


def apo_down_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    target: Tensor | None = None,
    weight: Tensor | None = None,
) -> PreferenceLoss:
    """APO-down: weighted sum over pairs of 1 + p [sigma(s_w) - sigma(h)] + (1 - p) [sigma(s_l) - sigma(-h)].

    s = beta (log pi - log pi_ref), h = s_w - s_l. With p = 1 it lowers the chosen response, and the rejected one more;
    it is meant for chosen responses that are worse than the model's own. It has no minimum: it falls until one response
    has all the probability, so what a run returns depends on where it stops. Source: D'Oosterlinck et al. 2024
    (Anchored Preference Optimization), eq. 8, with p = 1.

    Args: see `dpo_sigmoid_loss`.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chosen, rejected = beta * chosen, beta * rejected
    h = chosen - rejected
    losses = torch.sigmoid(chosen) - torch.sigmoid(h)
    if target is not None:
        losses = target * losses + (1.0 - target) * (torch.sigmoid(rejected) - torch.sigmoid(-h))
    return PreferenceLoss(_total(1.0 + losses, weight), chosen.detach(), rejected.detach())


def plackett_luce_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """DPO on rankings: sum over prompts of -sum_k log softmax(s_k, ..., s_K)_k, s = beta (log pi - log pi_ref).

    The best completion is chosen among all, the next among the remaining ones, and so on; K = 2 gives the sigmoid loss.
    The derivative with respect to s_j is sum_{k <= j} softmax(s_k, ..., s_K)_j - 1. Source: Rafailov et al. 2023,
    appendix A.3; Plackett 1975, Luce 1959.

    Args:
        logprobs, ref_logprobs: (E, K) of whole responses, summed over their tokens, in nats, best first, without ties.
        mask: (E, K) bool, true for responses, false for padding at the end.
        beta: > 0, see `dpo_sigmoid_loss`.
    """
    assert logprobs.ndim == 2 and logprobs.shape == ref_logprobs.shape == mask.shape
    scores = torch.where(mask, beta * (logprobs - ref_logprobs), 0.0)
    width = scores.shape[1]
    left = torch.ones(width, width, dtype=torch.bool, device=scores.device).triu() & mask[:, None, :]
    left = left | torch.eye(width, dtype=torch.bool, device=scores.device)  # padding: alone, so its probability is 1
    among = scores[:, None, :].expand(-1, width, -1).masked_fill(~left, -torch.inf)
    return (among.logsumexp(2) - scores).sum()


Optimum = Literal["same", "scale", "other"]
"""The relation of a minimiser to pi_ref exp(r / beta): the same; the same family at another beta; another."""


@dataclass(frozen=True)
class Objective:
    """A preference loss, its minimiser and its inputs.

    loss: (chosen, rejected, ref_chosen, ref_rejected, *, beta, target, weight) -> PreferenceLoss; for a listwise loss
        (logprobs, ref_logprobs, mask, *, beta) -> the sum over prompts; without a reference (chosen, rejected, *, beta,
        and options) -> (P,) losses.
    optimum: the relation of its minimiser to that of DPO and PPO at the same beta; arms are compared at one beta only
        if it is "same".
    length_normalised: whether it takes the mean of the log-probabilities over a response's tokens instead of the sum.
    listwise: whether it reads all completions of a prompt at once, in their order, instead of pairs.
    smoothing: (target, label_smoothing) -> the target that the loss reads; None: label_smoothing is not defined.
    needs_reference: whether it reads the log-probabilities of the reference.
    options: names of its options besides beta. odds: whether it compares log-odds instead of log-probabilities.
    """

    loss: Callable[..., Any]
    optimum: Optimum
    length_normalised: bool = False
    listwise: bool = False
    smoothing: Callable[[Tensor | None, float], Tensor | None] | None = None
    needs_reference: bool = True
    options: tuple[str, ...] = ()
    odds: bool = False


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(dpo_sigmoid_loss, "same", smoothing=smoothed_target),
    "robust": Objective(dpo_sigmoid_loss, "same", smoothing=unflipped_target),
    "hinge": Objective(hinge_loss, "other"),
    "ipo": Objective(ipo_loss, "scale"),
    "ipo_mean": Objective(ipo_loss, "other", length_normalised=True),
    "sigmoid_norm": Objective(dpo_sigmoid_loss, "other", length_normalised=True),
    "apo_zero": Objective(apo_zero_loss, "other"),
    "apo_down": Objective(apo_down_loss, "other"),
    "simpo": Objective(simpo_losses, "other", length_normalised=True, needs_reference=False, options=("gamma",)),
    "orpo": Objective(orpo_losses, "other", length_normalised=True, needs_reference=False, odds=True),
    "cpo": Objective(cpo_losses, "other", needs_reference=False),
    "plackett_luce": Objective(plackett_luce_loss, "same", listwise=True),
}


def loss_optimum(loss_type: str, label_smoothing: float = 0.0) -> Optimum:
    """The optimum of a loss with label smoothing, which puts DPO's margins (not robust DPO's) on another scale."""
    found = OBJECTIVES[loss_type]
    scaled = bool(label_smoothing) and found.smoothing is smoothed_target and found.optimum == "same"
    return "scale" if scaled else found.optimum


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 if the chosen response scores higher, one half for a tie, else 0; shape (P,)."""
    assert chosen.shape == rejected.shape
    return (chosen > rejected).to(torch.float64) + 0.5 * (chosen == rejected).to(torch.float64)
