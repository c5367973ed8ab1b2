"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rlhf_pipeline.errors import ConfigError, Fault

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamW:
    """AdamW, fused; weight decay applies to matrices only, not to vectors (norms, biases).

    Source: Loshchilov and Hutter 2019.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    decays = ((matrices, weight_decay), (vectors, 0.0))
    groups: list[dict[str, Any]] = [{"params": held, "weight_decay": decay} for held, decay in decays if held]
    return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def resolve_warmup(warmup_steps: float, total: int) -> int:
    """The number of warm-up steps; a value below 1 is a fraction of all steps, rounded up.

    Source: transformers, `TrainingArguments.get_warmup_steps`, which TRL uses as well.
    """
    return math.ceil(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)


def rate_factor(name: str, step: int, *, warmup: int, total: int, offset: int = 0) -> float:
    """The factor of the learning rate at a step.

    (step + offset) / (warmup + offset) while step < warmup; then, with p = (step - warmup) / (total - warmup):
    `linear` 1 - p, `cosine` (1 + cos(pi p)) / 2, `constant_with_warmup` 1. `constant` is 1 throughout.

    Source: transformers' schedules of the same names, at offset 0. (Importing transformers takes longer than the first
    steps of a small run.)

    Args:
        step: the number of steps done before, 0 for the first. warmup, total: in steps.
        offset: the factor of the first warm-up step is 0 with offset 0, and 1 / (warmup + 1) with offset 1.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; expected one of {', '.join(SCHEDULES)}")
    if name == "constant":
        return 1.0
    if step < warmup:
        return (step + offset) / (warmup + offset)
    if name == "constant_with_warmup":
        return 1.0
    left = max(1, total - warmup)
    if name == "linear":
        return max(0.0, (total - step) / left)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / left))))


def make_scheduler(
    optimizer: torch.optim.Optimizer, name: str, *, warmup_steps: float, total: int, offset: int = 0
) -> LambdaLR:
    """The schedule `name` over `total` steps (see `rate_factor`).

    Raises:
        ConfigError: the run has a single step, and its learning rate is 0.
    """
    warmup = resolve_warmup(warmup_steps, total)
    if total == 1 and rate_factor(name, 0, warmup=warmup, total=total, offset=offset) == 0.0:
        found = f"found {warmup_steps:g} in a run of one step, whose learning rate is then 0"
        raise ConfigError(Fault("warmup_steps", found, "warmup_steps: 0, or a longer run"))
    return LambdaLR(optimizer, lambda step: rate_factor(name, step, warmup=warmup, total=total, offset=offset))
