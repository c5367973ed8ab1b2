"""A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.training.windows import Window

Windows = Callable[[Any, int], Iterator[Window]]


def following(windows: Windows, policy: Policy, reference: Policy, *, share: float, every: int) -> Windows:
    """The same windows; before each whose number of earlier updates is a multiple of `every` the reference moves.

        pi_ref <- share pi + (1 - share) pi_ref, weight by weight

    The weights of the reference become buffers of the policy, so checkpoints hold them. A run that resumes at a
    multiple of `every` moves the reference first, as the run that was not interrupted does.

    Raises:
        MismatchError: the two models have different weights.
    """
    sizes = [[weight.shape for weight in model.model.parameters()] for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise MismatchError(
            "sync_ref_model: found a ref_model with weights of other shapes, expected those of the policy"
        )
    for name, weight in reference.model.named_parameters():
        policy.register_buffer(f"reference {name.replace('.', '/')}", weight.data)

    def remaining(prepared: Any, start: int) -> Iterator[Window]:
        for updates, window in enumerate(windows(prepared, start), start=start):
            if updates and updates % every == 0:
                move(policy, reference, share)
            yield window

    return remaining


@torch.no_grad()
def move(policy: Policy, reference: Policy, share: float) -> None:
    """Move the reference towards the policy, in place."""
    for mine, theirs in zip(reference.model.parameters(), policy.model.parameters(), strict=True):
        mine.mul_(1.0 - share).add_(theirs, alpha=share)
