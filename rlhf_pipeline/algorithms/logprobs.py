"""Log-probabilities of tokens from hidden states; no other module computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_pipeline.algorithms.rows import rows_computed

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""The largest positions x vocabulary of a chunk: 16 MiB in fp32 on a CPU, 256 MiB on a GPU."""

KEPT_ELEMENTS = 2**24
"""The largest number of probabilities kept for the backward pass, 64 MiB in fp32; more are computed again in chunks."""


def _rows(elements: int | None, device: torch.device, vocabulary: int) -> int:
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) if elements is None else elements
    return max(1, elements // vocabulary)


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


def _score(
    head: OutputHead, hidden: Tensor, targets: Tensor, rows: int, *, entropy: bool, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities (N,), entropies (N,) if `entropy`, and all probabilities (N, V) if `keep`."""
    count, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    logprobs = hidden.new_empty(count, dtype=wide)
    entropies = torch.empty_like(logprobs) if entropy else None
    kept = logprobs.new_empty(count, head.weight.shape[0]) if keep else None
    for start in range(0, count, rows):
        piece = slice(start, start + rows)
        chunk = torch.log_softmax(head.logits(hidden[piece]), dim=-1)
        logprobs[piece] = chunk.gather(-1, targets[piece, None]).squeeze(-1)
        if kept is None and entropies is None:
            continue
        probabilities = torch.exp(chunk, out=None if kept is None else kept[piece])
        if entropies is not None:
            entropies[piece] = -chunk.mul_(probabilities).sum(-1)
    return logprobs, entropies, kept


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T)[target] with its own backward pass: d logits = slope (onehot(target) - p) / T.

    p is the only tensor of size N x V that is kept, in the precision of its computation. Or nothing is kept, and the
    backward pass computes p again in chunks. With `trained`, entropies H have gradients: d logits = -p (log p + H) / T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rows: int,
        entropy: bool,
        trained: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        head = OutputHead(weight, bias, temperature)
        logprobs, entropies, kept = _score(head, hidden, targets, rows, entropy=entropy, keep=keep)
        ctx.save_for_backward(hidden, weight, bias, targets, kept, entropies if trained else None)
        ctx.temperature, ctx.rows = temperature, rows
        if entropies is not None and not trained:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, entropy_slope: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept, entropies = ctx.saved_tensors
        head, wide = OutputHead(weight, bias, ctx.temperature), slope.dtype
        scale = slope[:, None] / ctx.temperature
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        to_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        # In the precision of the forward pass, regardless of the autocast around the backward pass.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], ctx.rows):
                piece = slice(start, start + ctx.rows)
                probabilities = torch.softmax(head.logits(hidden[piece]), dim=-1) if kept is None else kept[piece]
                pull = -scale[piece]
                if entropies is not None and entropy_slope is not None:
                    surprise = torch.special.xlogy(probabilities, probabilities)
                    steps = entropy_slope[piece, None] / ctx.temperature
                    logits = probabilities * (pull - steps * entropies[piece, None]) - steps * surprise
                else:
                    logits = probabilities.mul_(pull) if kept is None else probabilities * pull
                logits.scatter_add_(1, targets[piece, None], scale[piece])
                if to_bias is not None:
                    to_bias += logits.sum(0)
                logits = logits.to(weight.dtype)
                if to_hidden is not None:
                    to_hidden[piece] = logits @ weight
                if to_weight is not None and weight.dtype == wide:
                    torch.addmm(to_weight, logits.t(), hidden[piece], out=to_weight)  # FLOP counters ignore addmm_
                elif to_weight is not None:
                    to_weight += logits.t() @ hidden[piece]
        return (
            to_hidden,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(weight.dtype),
            *[None] * 6,
        )


def token_logprobs(
    head: OutputHead,
    hidden: Tensor,
    targets: Tensor,
    *,
    entropy: bool = True,
    train_entropy: bool = False,
    chunk_elements: int | None = None,
    kept_elements: int = KEPT_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(hidden W^T / T)[target] and the entropy of each distribution.

    Computed in at least fp32, in chunks of positions, with its own backward pass: memory is bounded by `chunk_elements`
    and `kept_elements`, not by N x V. Without gradients nothing is kept.

    Args:
        hidden: (N, D) states at the positions that predict `targets`.
        targets: (N,) token ids.
        entropy: whether to compute the entropy, which costs an exponential of all logits; False for references.
        train_entropy: whether the entropy has a gradient.
        chunk_elements: the largest positions x vocabulary of a chunk; None: `CHUNK_ELEMENTS` of the device.
        kept_elements: the largest number of probabilities kept for the backward pass.

    Returns:
        logprobs (N,), in nats, differentiable once; entropy (N,), in nats, or None.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1]
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:  # cast once, not per chunk
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(low), weight.to(low), None if bias is None else bias.to(low)
    count = hidden.shape[0]
    if more := rows_computed(count, hidden.device, hidden.dtype) - count:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, more))
        targets = torch.nn.functional.pad(targets, (0, more))
    rows = _rows(chunk_elements, hidden.device, weight.shape[0])
    inputs = (hidden, weight, bias)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        logprobs, entropies, _ = _score(
            OutputHead(weight, bias, head.temperature), hidden, targets, rows, entropy=entropy, keep=False
        )
    else:
        keep = hidden.shape[0] * weight.shape[0] <= kept_elements
        options = (head.temperature, rows, entropy, train_entropy, keep)
        logprobs, entropies = _TokenLogprobs.apply(*inputs, targets, *options)
    return logprobs[:count], None if entropies is None else entropies[:count]


@torch.no_grad()
def token_kl(
    head: OutputHead,
    hidden: Tensor,
    ref_head: OutputHead,
    ref_hidden: Tensor,
    *,
    chunk_elements: int | None = None,
) -> Tensor:
    """Return the exact KL at each position, (N,) in nats: sum_v pi(v) [log pi(v) - log pi_ref(v)].

    Its sum over a response sampled from pi is an unbiased, low-variance estimate of the sequence KL.
    """
    assert hidden.shape[0] == ref_hidden.shape[0]
    rows = _rows(chunk_elements, hidden.device, head.weight.shape[0])
    pieces = []
    for mine, theirs in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
        logp = torch.log_softmax(head.logits(mine), dim=-1)
        ref_logp = torch.log_softmax(ref_head.logits(theirs), dim=-1)
        difference = ref_logp.neg_().add_(logp)
        pieces.append(difference.mul_(logp.exp_()).sum(-1))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0)
