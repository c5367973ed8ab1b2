"""Whether an optimizer moves weights of 16 bits at all: steps that are small against a weight round to nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlhf_pipeline.models.sharding import local

SAMPLE = 4096
"""At most so many weights of each tensor are looked at, or twice as many; of a divided tensor those of this process."""

Sample = list[tuple[Tensor, Tensor]]


def _some(parameter: Tensor) -> Tensor:
    flat = local(parameter).flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]


def sample_weights(parameters: Iterable[nn.Parameter]) -> Sample:
    """The trained parameters of 16 bits, each with some of its present weights; [] where all have more bits."""
    narrow = (torch.bfloat16, torch.float16)
    return [(p, _some(p).clone()) for p in parameters if p.requires_grad and p.dtype in narrow]


def changed_share(sample: Sample) -> float:
    """The share of the sampled weights that differ from what they were."""
    changed = torch.stack([(_some(parameter) != before).sum() for parameter, before in sample]).sum()
    return float(changed) / max(1, sum(before.numel() for _, before in sample))
