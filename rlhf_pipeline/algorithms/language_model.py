"""The SFT loss."""

from __future__ import annotations

from torch import Tensor


def negative_log_likelihood(logprobs: Tensor) -> Tensor:
    """Sum over completion tokens of -log pi(token | prefix); logprobs: (N,), active tokens only."""
    assert logprobs.ndim == 1
    return -logprobs.sum()
