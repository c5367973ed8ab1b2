"""Statistics over the active entries of a padded tensor; the values of inactive entries have no effect."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `values` where `mask` is true: sum_i m_i x_i.

    Args:
        values: any shape; inactive entries may hold any value, including NaN and infinity.
        mask: bool, same shape.
        dim: the dimension to sum over; None: all.
    """
    assert values.shape == mask.shape and mask.dtype == torch.bool
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true: sum_i m_i x_i / sum_i m_i."""
    return masked_sum(values, mask) / mask.sum()


def moments(count: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance from a count, a sum and a sum of squares, which can be added up over ranks."""
    mean = total / count
    return mean, (square / count - mean**2).clamp_min(0.0)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce=lambda sums: sums) -> Tensor:
    """Scale the active entries to variance 1 and, with `shift_mean`, to mean 0; inactive entries become 0.

        x' = (x - mean) / sqrt(var + 1e-8)   [+ mean, without shift_mean]

    Args:
        values: (C, R). mask: (C, R) bool.
        reduce: adds a (3,) float64 vector of sums over all ranks.
    """
    active = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).double()
    count, total, square = reduce(torch.stack([mask.sum().double(), active.sum(), (active**2).sum()])).unbind()
    mean, var = moments(count, total, square)
    # Two passes would be safer for very large means; in float64 one pass is exact enough for advantages and rewards.
    scaled = (active - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        scaled = scaled + mean
    return torch.where(mask, scaled, torch.zeros_like(scaled)).to(values.dtype)
