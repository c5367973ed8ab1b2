"""The one place where hidden states become log-probabilities of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Positions x vocabulary that are held at once: 64 MiB in fp32."""


@dataclass(frozen=True)
class OutputHead:
    """The last linear map of a language model. weight: (V, D); bias: (V,) or None; temperature: T > 0."""

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (N, V) logits / T in at least fp32; hidden: (N, D)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.temperature == 1.0 else logits / self.temperature


def _chunk_logprobs(head: OutputHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden)
    logprobs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def token_logprobs(
    head: OutputHead, hidden: Tensor, targets: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden W^T / T)[target] and the entropy of each distribution.

    Computed in at least fp32 and in chunks of positions; with more than one chunk the logits of a chunk
    are recomputed in the backward pass, so memory is bounded by `chunk_elements`, not by N x V.

    Args:
        hidden: (N, D) states at the positions that predict `targets`.
        targets: (N,) token ids.

    Returns:
        logprobs (N,), differentiable; entropy (N,), in nats, detached.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1]
    rows = max(1, chunk_elements // head.weight.shape[0])
    if hidden.shape[0] <= rows:
        return _chunk_logprobs(head, hidden, targets)
    pieces = [
        checkpoint(_chunk_logprobs, head, hidden_chunk, target_chunk, use_reentrant=False)
        for hidden_chunk, target_chunk in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


@torch.no_grad()
def token_kl(
    head: OutputHead,
    hidden: Tensor,
    ref_head: OutputHead,
    ref_hidden: Tensor,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return the exact KL at each position: sum_v pi(v) [log pi(v) - log pi_ref(v)], shape (N,).

    Summed along responses sampled from pi it is an unbiased, low-variance estimate of the sequence KL.
    """
    assert hidden.shape[0] == ref_hidden.shape[0]
    rows = max(1, chunk_elements // head.weight.shape[0])
    pieces = []
    for mine, theirs in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
        logp = torch.log_softmax(head.logits(mine), dim=-1)
        ref_logp = torch.log_softmax(ref_head.logits(theirs), dim=-1)
        pieces.append((logp.exp() * (logp - ref_logp)).sum(-1))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0)
