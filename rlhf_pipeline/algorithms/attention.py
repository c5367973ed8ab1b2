"""Attention within packed trees: no padding, no mask of length x length, nothing of that size kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tree = tuple[int, tuple[int, ...]]
"""Tokens of a prompt, and of each of its completions, which follow it one after another."""

QUERIES = 160
"""Queries that are scored at once, at most: their scores stay in the processor's cache."""
WHOLE = 192
"""Tokens of a tree, up to which scoring pairs that may not see each other costs less than avoiding them."""
KEPT = 4
"""Attention is kept for the backward pass as long as it takes no more memory than this many copies of the queries."""


@dataclass(frozen=True)
class Block:
    """Queries [first, end) of a row and the n keys that they are scored against: those of [start, start + shared) and
    of [rest, end). bias: (r, n), 0 where a query may see a key, else -inf."""

    start: int
    shared: int
    rest: int
    first: int
    end: int
    bias: Tensor

    def keys(self, states: Tensor) -> Tensor:
        """(H, n, D) of (H, T, D) keys or values; a copy only where they are not contiguous."""
        if not self.shared:
            return states[:, self.rest : self.end]
        return torch.cat((states[:, self.start : self.start + self.shared], states[:, self.rest : self.end]), dim=1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add (H, n, D) to where `keys` were taken from."""
        if self.shared:
            total[:, self.start : self.start + self.shared] += part[:, : self.shared]
            total[:, self.rest : self.end] += part[:, self.shared :]
        else:
            total[:, self.rest : self.end] += part


@lru_cache(maxsize=32)
def _band(rows: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, before + rows): row i sees `window` columns up to before + i."""
    seen = torch.ones(rows, before + rows, dtype=torch.bool, device=device).tril(before)
    if window is not None:
        seen &= torch.ones_like(seen).triu(before - window + 1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _causal(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(r, n): the last r of n positions are the queries' own, and each sees `window` positions up to itself."""
    # It depends on distances alone, so that all sizes are views of one matrix: none is kept for each block.
    before = keys - queries
    rows, reach = (max(256, 1 << (size - 1).bit_length()) for size in (queries, before))
    return _band(rows, reach, window, dtype, device)[:queries, reach - before : reach + queries]


def _whole(prompt: int, completions: Sequence[int], window: int | None, like: Tensor) -> Tensor:
    """(L, L) for a whole tree: no completion sees an earlier one."""
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
    """What `tree_attention` does, for trees that stand one after another: made once, used by every layer.

    Args:
        trees: (tokens of the prompt, tokens of each completion).
        window: a token sees keys less than this many positions before it, where a completion's positions continue its
            prompt's; None: all.
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
    """(H, G * r, n) attention of the block's r queries, in G heads for each key head."""
    bias = block.bias if groups == 1 else block.bias.repeat(groups, 1)
    return torch.softmax(torch.baddbmm(bias, query, keys.transpose(1, 2)), dim=-1)


def _heads_together(states: Tensor, first: int, end: int) -> Tensor:
    """(H_kv, G * r, D) of rows [first, end) of (H_kv, G, T, D)."""
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
        with torch.autocast(grad_output.device.type, enabled=False):  # a caller may be within autocast again
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
    """Return softmax(scale Q K^T + M) V, where M lets a token see its prompt and its own completion, up to itself.

    Computed in at least fp32, block by block of queries: the work grows with the pairs of tokens that may see each
    other (next to none is done for others), the memory with the tokens.

    Args:
        query: (H, T, D); key: (H_kv, T, D) and value: (H_kv, T, D_v), where H_kv divides H (query heads that share a
            key head are neighbours).
        plan: of trees whose tokens add up to T, in the type in which it is computed.

    Returns:
        (H, T, D_v) in the type of `value`.
    """
    assert query.ndim == key.ndim == value.ndim == 3 and key.shape[:2] == value.shape[:2]
    kind = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        output = _TreeAttention.apply(query.to(kind), key.to(kind), value.to(kind), plan, scale)
    return output.to(value.dtype)
