"""Attention within packed trees, without padding and without a matrix of length x length in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tree = tuple[int, tuple[int, ...]]
"""The number of tokens of a prompt, and of each of its completions, which follow it in sequence."""

QUERIES = 160
"""The largest number of queries scored at once, so that their scores stay in the processor's cache."""
WHOLE = 192
"""Up to this number of tokens in a tree, scoring masked pairs of tokens costs less than avoiding them."""
KEPT = 4
"""Attention is kept for the backward pass if it takes at most the memory of this many copies of the queries."""


@dataclass(frozen=True)
class Block:
    """Queries [first, end) of a row and their n keys, [start, start + shared) and [rest, end).

    bias: (r, n), 0 where a query may see a key, else -inf.
    """

    start: int
    shared: int
    rest: int
    first: int
    end: int
    bias: Tensor

    def keys(self, states: Tensor) -> Tensor:
        """Select the block's (H, n, D) from (H, T, D) keys or values; a copy only if they are not contiguous."""
        if not self.shared:
            return states[:, self.rest : self.end]
        return torch.cat((states[:, self.start : self.start + self.shared], states[:, self.rest : self.end]), dim=1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add `part` (H, n, D) to the positions of `total` that `keys` selects."""
        if self.shared:
            total[:, self.start : self.start + self.shared] += part[:, : self.shared]
            total[:, self.rest : self.end] += part[:, self.shared :]
        else:
            total[:, self.rest : self.end] += part


@lru_cache(maxsize=32)
def _band(rows: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bias (rows, before + rows): row i sees `window` columns up to before + i."""
    seen = torch.ones(rows, before + rows, dtype=torch.bool, device=device).tril(before)
    if window is not None:
        seen &= torch.ones_like(seen).triu(before - window + 1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _causal(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bias (r, n): the queries are the last r of n positions, and each sees `window` positions up to itself."""
    # The bias depends only on distances, so all sizes are views of one matrix.
    before = keys - queries
    rows, reach = (max(256, 1 << (size - 1).bit_length()) for size in (queries, before))
    return _band(rows, reach, window, dtype, device)[:queries, reach - before : reach + queries]


def _whole(prompt: int, completions: Sequence[int], window: int | None, like: Tensor) -> Tensor:
    """A bias (L, L) for a whole tree: no completion sees another one."""
    length = prompt + sum(completions)
    bias = _causal(length, length, None, like.dtype, like.device).clone()
    begin = prompt
    for count in completions:
        bias[begin : begin + count, prompt:begin] = -torch.inf
        if window is not None:  # positions continue those of the prompt
            near = _causal(prompt + count, prompt + count, window, like.dtype, like.device)
            bias[begin : begin + count, :prompt] = near[prompt:, :prompt]
            bias[begin : begin + count, begin : begin + count] = near[prompt:, prompt:]
        begin += count
    if window is not None:
        bias[:prompt, :prompt] = _causal(prompt, prompt, window, like.dtype, like.device)
    return bias


def _cut(first: int, count: int) -> Iterator[tuple[int, int]]:
    """Equal pieces of at most `QUERIES` queries."""
    size = -(-count // max(1, -(-count // QUERIES)))
    for begin in range(first, first + count, size):
        yield begin, min(begin + size, first + count)


def attention_plan(
    trees: Sequence[Tree],
    *,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Block]:
    """The blocks that `tree_attention` computes for consecutive trees; made once and used by every layer.

    Args:
        trees: (tokens of the prompt, tokens of each completion) of each tree.
        window: a token sees only keys less than this many positions before it; None: all. The positions of a completion
            continue those of its prompt.
    """
    like = torch.empty(0, dtype=dtype, device=device)
    plan, start = [], 0
    for prompt, completions in trees:
        length = prompt + sum(completions)
        if length <= WHOLE and len(completions) > 1:
            bias = _whole(prompt, completions, window, like)
            plan.append(Block(start, 0, start, start, start + length, bias))
        else:
            # A prompt and its first completion are one plain sequence.
            begin, own = start, prompt + sum(completions[:1])
            for number, count in enumerate((own, *completions[1:])):
                shared = prompt if number else 0
                for first, end in _cut(begin, count):
                    bias = _causal(end - first, shared + end - begin, window, like.dtype, like.device)
                    plan.append(Block(start, shared, begin, first, end, bias))
                begin += count
        start += length
    return plan


def _probabilities(block: Block, query: Tensor, keys: Tensor, groups: int) -> Tensor:
    """The attention (H, G * r, n) of the block's r queries, with G query heads per key head."""
    bias = block.bias if groups == 1 else block.bias.repeat(groups, 1)
    return torch.softmax(torch.baddbmm(bias, query, keys.transpose(1, 2)), dim=-1)


def _heads_together(states: Tensor, first: int, end: int) -> Tensor:
    """Rows [first, end) of (H_kv, G, T, D) as (H_kv, G * r, D)."""
    if states.shape[1] == 1:
        return states[:, 0, first:end]
    return states[:, :, first:end].flatten(1, 2)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: list[Block], scale: float) -> Tensor:
        heads, groups = key.shape[0], query.shape[0] // key.shape[0]
        scaled = (query * scale).unflatten(0, (heads, groups))
        pieces, kept = [], []
        room = KEPT * query.numel() if ctx.needs_input_grad[0] else 0
        for block in plan:
            attention = _probabilities(block, _heads_together(scaled, block.first, block.end), block.keys(key), groups)
            seen = torch.bmm(attention, block.keys(value)).view(heads * groups, block.end - block.first, -1)
            pieces.append(seen.transpose(0, 1))
            room -= attention.numel()
            if room >= 0:
                kept.append(attention)
        ctx.save_for_backward(scaled, key, value, *kept)
        ctx.plan, ctx.scale = plan, scale
        return torch.cat(pieces).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        scaled, key, value, *kept = ctx.saved_tensors
        heads, groups = scaled.shape[:2]
        grads = grad_output.unflatten(0, (heads, groups))
        grad_key, grad_value, pieces = torch.zeros_like(key), torch.zeros_like(value), []
        with torch.autocast(grad_output.device.type, enabled=False):  # the caller of backward() may be within autocast
            for number, block in enumerate(ctx.plan):
                keys = block.keys(key)
                query, grad = (_heads_together(states, block.first, block.end) for states in (scaled, grads))
                attention = kept[number] if number < len(kept) else _probabilities(block, query, keys, groups)
                slope = torch.bmm(grad, block.keys(value).transpose(1, 2))
                slope = torch._softmax_backward_data(slope, attention, -1, attention.dtype)
                pieces.append(torch.bmm(slope, keys).view(heads * groups, block.end - block.first, -1).transpose(0, 1))
                block.add(grad_key, torch.bmm(slope.transpose(1, 2), query))
                block.add(grad_value, torch.bmm(attention.transpose(1, 2), grad))
        return torch.cat(pieces).transpose(0, 1) * ctx.scale, grad_key, grad_value, None, None


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: list[Block], *, scale: float) -> Tensor:
    """Return softmax(scale Q K^T + M) V; under M a token sees its prompt and its own completion, up to itself.

    Computed in at least fp32, in blocks of queries. The work grows with the number of pairs of tokens that may see each
    other (there is almost none for other pairs), the memory with the number of tokens.

    Args:
        query: (H, T, D); key: (H_kv, T, D) and value: (H_kv, T, D_v), where H_kv divides H (query heads that share a
            key head are neighbours).
        plan: an `attention_plan` of trees whose tokens add up to T; its dtype is that of the computation.

    Returns:
        (H, T, D_v) in the type of `value`.
    """
    assert query.ndim == key.ndim == value.ndim == 3 and key.shape[:2] == value.shape[:2]
    kind = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        output = _TreeAttention.apply(query.to(kind), key.to(kind), value.to(kind), plan, scale)
    return output.to(value.dtype)
