"""How many rows a product of matrices computes, where a new number of rows is expensive."""

from __future__ import annotations

import torch

FEWEST = 16
EIGHTHS = 3
"""Numbers of rows are multiples of 2^-EIGHTHS of the next lower power of two: eight to an octave."""


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a product of tensors of `dtype` is computed, under autocast or not."""
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def rows_computed(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of rows that a product in `dtype` computes for `rows` rows; the others are not read.

    On a CPU oneDNN compiles a product in bfloat16 for each number of rows, which takes up to ten times as long as the
    product. Batches without padding have a new number at every step, so it is rounded up to one of eight in an octave:
    at most 1/8 more rows, or FEWEST - 1. In all other cases it is `rows`.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or rows < 1:
        return rows
    step = max(FEWEST, 1 << max(0, (rows - 1).bit_length() - 1 - EIGHTHS))
    return -(-rows // step) * step
