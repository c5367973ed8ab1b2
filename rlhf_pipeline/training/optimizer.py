"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamW:
    """AdamW, fused; weight decay spares vectors (norms, biases)."""
    decayed, spared = [], []
    for parameter in parameters:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def resolve_warmup(warmup_steps: float, total: int) -> int:
    """Steps of warm-up; a value below 1 is a fraction of all steps."""
    return round(warmup_steps * total) if 0 < warmup_steps < 1 else int(warmup_steps)


def make_scheduler(optimizer: torch.optim.Optimizer, name: str, *, warmup_steps: float, total: int) -> LambdaLR:
    """The schedule of transformers with this name, over `total` steps."""
    from transformers import get_scheduler

    return get_scheduler(
        name, optimizer, num_warmup_steps=resolve_warmup(warmup_steps, total), num_training_steps=total
    )
