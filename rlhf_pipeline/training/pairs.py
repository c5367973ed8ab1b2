"""Functions that the preference stages share: splitting (C,) tensors into pairs, preference losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.divergences import divergence_scores
from rlhf_pipeline.algorithms.preference import OBJECTIVES, Objective, PreferenceLoss
from rlhf_pipeline.algorithms.reference_free import log_odds
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.losses import is_reference_free
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.comparisons import Comparisons
from rlhf_pipeline.data.examples import Example, count_pairs
from rlhf_pipeline.errors import DataError, Fault


def recorded_margins(examples: Sequence[Example]) -> Tensor:
    """The recorded margin of each pair, (examples,) float64.

    Raises:
        DataError: an example has no margin.
    """
    lacking = [example for example in examples if example.margin is None]
    if lacking:
        found = f"no margin in {len(lacking)} of {len(examples)} rows, which use_margin needs"
        expected = "pairs with a column 'margin': how much higher the reward of the chosen response should be"
        raise DataError(Fault(lacking[0].where, found, expected, "or set use_margin: false"))
    return torch.tensor([example.margin for example in examples], dtype=torch.float64)


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
    """The loss of a DPO run: a sum of objectives and their options; sft_weight is that of the SFT loss beside them.

    losses: name and weight of each objective. divergence, alpha: see `divergence_scores`. ld_alpha: see
    `response_logprobs`.
    """

    beta: float
    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    label_smoothing: float = 0.0
    gamma: float = 0.0
    sft_weight: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    ld_alpha: float | None = None

    @staticmethod
    def of(config: DpoConfig) -> Criterion:
        weighed = config.f_divergence, config.alpha, config.ld_alpha
        return Criterion(config.beta, config.losses, config.label_smoothing, config.gamma, config.sft_term, *weighed)

    @property
    def objectives(self) -> list[tuple[Objective, float]]:
        return [(OBJECTIVES[name], weight) for name, weight in self.losses]

    @property
    def needs_reference(self) -> bool:
        return not is_reference_free([name for name, _ in self.losses])

    def rewards(self, logprobs: Tensor, ref_logprobs: Tensor | None, lengths: Tensor) -> Tensor:
        """Implicit rewards of responses: beta (log pi - log pi_ref), summed over tokens whatever the loss reads.

        With another divergence beta f'(pi / pi_ref).
        Without a reference: beta log pi as the first loss reads it (simpo: mean over tokens); for orpo the log-odds.
        """
        if self.needs_reference:
            assert ref_logprobs is not None
            return self.beta * divergence_scores(logprobs - ref_logprobs, self.divergence, self.alpha)
        first, _ = self.objectives[0]
        read = logprobs / lengths if first.length_normalised else logprobs
        return log_odds(read) if first.odds else self.beta * read


def response_logprobs(criterion: Criterion, batch: PackedBatch, logprobs: Tensor) -> Tensor:
    """(C,) log-probabilities of responses, from those of their tokens (N,).

    With `ld_alpha`, the tokens beyond the length of the other response of the pair have this weight: log pi(y_<=l) +
    alpha log pi(y_>l), l = min(|y_w|, |y_l|). Source: Liu et al. 2024 (LD-DPO), eq. 9 and 10.
    """
    if criterion.ld_alpha is None:
        return batch.per_completion(logprobs)
    shared = batch.lengths.view(-1, 2).amin(1).repeat_interleave(2)
    beyond = batch.offset >= shared[batch.completion_index]
    return batch.per_completion(torch.where(beyond, criterion.ld_alpha * logprobs, logprobs))


def preference_loss(
    criterion: Criterion,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    lengths: Tensor,
    compared: Comparisons | None,
    *,
    target: Tensor | None = None,
    margin: Tensor | None = None,
) -> PreferenceLoss:
    """The preference losses on a batch of pairs and rankings, as a sum over prompts, and the pairs' implicit rewards.

    Args:
        logprobs, ref_logprobs: (C,) log-probabilities of whole responses, summed over tokens, in nats; the
            latter is None for losses without a reference.
        lengths: (C,) tokens of the responses.
        compared: see `split_pairs`. target: (P,), the probability that the chosen response is preferred; None: 1.
        margin: (P,), see `dpo_sigmoid_loss`; only that loss has one.
    """
    inputs = (logprobs, ref_logprobs, lengths, compared, target, margin)
    losses = [weight * _loss(criterion, objective, *inputs) for objective, weight in criterion.objectives]
    rewards = criterion.rewards(logprobs.detach(), ref_logprobs, lengths)
    return PreferenceLoss(torch.stack(losses).sum(), *split_pairs(rewards, compared))


def _loss(
    criterion: Criterion,
    objective: Objective,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    lengths: Tensor,
    compared: Comparisons | None,
    target: Tensor | None,
    margin: Tensor | None,
) -> Tensor:
    """One objective as a sum over prompts; the arguments are those of `preference_loss`."""
    sizes = lengths if objective.length_normalised else 1
    weight = None if compared is None else compared.weight(logprobs)
    options = {name: getattr(criterion, name) for name in ("beta", *objective.options)}
    if margin is not None:
        options["margin"] = margin
    if objective.listwise:
        assert ref_logprobs is not None
        if compared is None:
            rows, ref_rows = logprobs.view(-1, 2), ref_logprobs.view(-1, 2)
            return objective.loss(rows, ref_rows, torch.ones_like(rows, dtype=torch.bool), **options)
        return objective.loss(compared.spread(logprobs), compared.spread(ref_logprobs), compared.mask(), **options)
    chosen, rejected = split_pairs(logprobs / sizes, compared)
    if not objective.needs_reference:
        losses: Tensor = objective.loss(chosen, rejected, **options)
        if target is not None:
            losses = target * losses + (1.0 - target) * objective.loss(rejected, chosen, **options)
        return losses.sum() if weight is None else (weight * losses).sum()
    assert ref_logprobs is not None
    reference = split_pairs(ref_logprobs / sizes, compared)
    if criterion.divergence != "reverse_kl":
        scores = divergence_scores(logprobs - ref_logprobs, criterion.divergence, criterion.alpha)
        chosen, rejected = split_pairs(scores / sizes, compared)
        reference = torch.zeros_like(chosen), torch.zeros_like(rejected)
    if objective.smoothing is not None:
        target = objective.smoothing(target, criterion.label_smoothing)
    return objective.loss(chosen, rejected, *reference, target=target, weight=weight, **options).loss
