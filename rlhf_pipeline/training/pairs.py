"""Functions that the preference stages share: splitting (C,) tensors into pairs, preference losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import OBJECTIVES, Objective, PreferenceLoss
from rlhf_pipeline.algorithms.reference_free import log_odds
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.data.comparisons import Comparisons
from rlhf_pipeline.data.examples import Example, count_pairs


def total_pairs(examples: Sequence[Example]) -> int:
    """The number of untied pairs of all examples."""
    return count_pairs(examples)


def split_pairs(values: Tensor, compared: Comparisons | None = None) -> tuple[Tensor, Tensor]:
    """Split completion values (C,) into those of the preferred and of the other completion of each pair, (P,) each.

    compared: the pairs; None: C = 2P, and chosen and rejected alternate.
    """
    if compared is not None:
        return values.index_select(0, compared.better), values.index_select(0, compared.worse)
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def first_completions(count: int, compared: Comparisons | None = None) -> Tensor:
    """(C,) bool, true for the first completion of each example: the chosen one, in rankings the best; C = count."""
    return torch.arange(count) % 2 == 0 if compared is None else compared.place == 0


@dataclass(frozen=True)
class Criterion:
    """The loss of a DPO run: an objective and its options; sft_weight is the weight of the SFT loss beside it."""

    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma: float = 0.0
    sft_weight: float = 0.0

    @staticmethod
    def of(config: DpoConfig) -> Criterion:
        return Criterion(config.beta, config.loss_type, config.label_smoothing, config.gamma, config.sft_term)

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.loss_type]

    def smoothed(self, target: Tensor | None) -> Tensor | None:
        """The target that the loss reads, from the probability that the chosen response is preferred."""
        smoothing = self.objective.smoothing
        return target if smoothing is None else smoothing(target, self.label_smoothing)

    def rewards(self, logprobs: Tensor, ref_logprobs: Tensor | None, lengths: Tensor) -> Tensor:
        """Implicit rewards of responses: beta (log pi - log pi_ref), summed over tokens whatever the loss reads.

        Without a reference: beta log pi as the loss reads it (simpo: mean over tokens); for orpo the log-odds.
        """
        if self.objective.needs_reference:
            assert ref_logprobs is not None
            return self.beta * (logprobs - ref_logprobs)
        read = logprobs / lengths if self.objective.length_normalised else logprobs
        return log_odds(read) if self.objective.odds else self.beta * read


def preference_loss(
    criterion: Criterion,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    lengths: Tensor,
    compared: Comparisons | None,
    *,
    target: Tensor | None = None,
) -> PreferenceLoss:
    """A preference loss on a batch of pairs and rankings, as a sum over prompts, and the implicit rewards of the pairs.

    Args:
        logprobs, ref_logprobs: (C,) log-probabilities of whole responses, summed over tokens, in nats; the
            latter is None for a loss without a reference.
        lengths: (C,) tokens of the responses.
        compared: see `split_pairs`. target: (P,), the probability that the chosen response is preferred; None: 1.
    """
    objective, beta = criterion.objective, criterion.beta
    if not objective.needs_reference:
        return _reference_free_loss(criterion, logprobs, lengths, compared, target)
    assert ref_logprobs is not None
    (chosen, rejected), (ref_chosen, ref_rejected) = (split_pairs(x, compared) for x in (logprobs, ref_logprobs))
    if objective.listwise:
        if compared is None:
            rows, ref_rows = logprobs.view(-1, 2), ref_logprobs.view(-1, 2)
            mask = torch.ones_like(rows, dtype=torch.bool)
        else:
            rows, ref_rows, mask = compared.spread(logprobs), compared.spread(ref_logprobs), compared.mask()
        loss = objective.loss(rows, ref_rows, mask, beta=beta)
        rewards = [(beta * (x - ref)).detach() for x, ref in ((chosen, ref_chosen), (rejected, ref_rejected))]
        return PreferenceLoss(loss, *rewards)
    sizes = split_pairs(lengths, compared) if objective.length_normalised else (1, 1)
    result: PreferenceLoss = objective.loss(
        chosen / sizes[0],
        rejected / sizes[1],
        ref_chosen / sizes[0],
        ref_rejected / sizes[1],
        beta=beta,
        target=criterion.smoothed(target),
        weight=None if compared is None else compared.weight(logprobs),
    )
    return PreferenceLoss(result.loss, result.chosen_rewards * sizes[0], result.rejected_rewards * sizes[1])


def _reference_free_loss(
    criterion: Criterion, logprobs: Tensor, lengths: Tensor, compared: Comparisons | None, target: Tensor | None
) -> PreferenceLoss:
    objective = criterion.objective
    read = logprobs / lengths if objective.length_normalised else logprobs
    chosen, rejected = split_pairs(read, compared)
    options = {name: getattr(criterion, name) for name in ("beta", *objective.options)}
    losses: Tensor = objective.loss(chosen, rejected, **options)
    if target is not None:
        losses = target * losses + (1.0 - target) * objective.loss(rejected, chosen, **options)
    if compared is not None:
        losses = compared.weight(logprobs) * losses
    return PreferenceLoss(losses.sum(), *split_pairs(criterion.rewards(logprobs.detach(), None, lengths), compared))
