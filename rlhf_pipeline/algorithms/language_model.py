"""The SFT loss."""

from __future__ import annotations

from torch import Tensor


def negative_log_likelihood(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood in nats: sum over completion tokens of -log pi(token | prefix).

    Args:
        logprobs: (N,), active tokens only.
    """
    assert logprobs.ndim == 1
    return -logprobs.sum()
