"""Functions that the preference stages share: splitting (C,) tensors into pairs, preference losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import Objective, PreferenceLoss
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
        found = "no margin, which use_margin needs"
        expected = "pairs with a column 'margin': how much higher the reward of the chosen response should be"
        raise DataError([Fault(example.where, found, expected, "or set use_margin: false") for example in lacking])
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


def preference_loss(
    objective: Objective,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    lengths: Tensor,
    compared: Comparisons | None,
    *,
    beta: float,
    target: Tensor | None = None,
    margin: Tensor | None = None,
) -> PreferenceLoss:
    """A preference loss on a batch of pairs and rankings, as a sum over prompts, and the implicit rewards of the pairs.

    Args:
        logprobs, ref_logprobs: (C,) log-probabilities of whole responses, summed over tokens, in nats.
        lengths: (C,) tokens of the responses.
        compared: see `split_pairs`. target: (P,), see the pair losses. margin: (P,), see `dpo_sigmoid_loss`.
    """
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
        target=target,
        weight=None if compared is None else compared.weight(logprobs),
        **({} if margin is None else {"margin": margin}),
    )
    return PreferenceLoss(result.loss, result.chosen_rewards * sizes[0], result.rejected_rewards * sizes[1])
