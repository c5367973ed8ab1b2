"""Compute the last layer only at positions whose hidden states are read.

The keys and values of every position are needed. The query and output projections and the MLP of the last layer are
needed only at the positions that are read: completions, or the last token of each. Hooks on these modules, which work
position by position, select these rows before and put them back after; other rows keep the input of the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.rows import product_dtype, rows_computed

LAYERS = ("layers", "h")
ATTENTIONS = ("self_attn", "attn", "attention")
PROJECTIONS = ("q_proj", "o_proj", "out_proj", "c_proj", "dense")
MLPS = ("mlp",)

_read: ContextVar[Tensor | None] = ContextVar("read", default=None)
_shape: ContextVar[torch.Size] = ContextVar("shape")


def _take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows = _read.get()
    if rows is None:
        return None
    states, *others = arguments
    _shape.set(states.shape[:-1])
    return states.flatten(0, -2).index_select(0, rows)[None], *others


def _put(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
    rows = _read.get()
    if rows is None:
        return None
    shape = _shape.get()
    whole = output.new_zeros(shape.numel(), output.shape[-1])
    return whole.index_copy(0, rows, output[0]).unflatten(0, shape)


def _position_wise(trunk: nn.Module) -> list[nn.Module]:
    layers = next((found for name in LAYERS if isinstance(found := getattr(trunk, name, None), nn.ModuleList)), None)
    if not layers:
        return []
    last = layers[-1]
    attention = next((getattr(last, name) for name in ATTENTIONS if hasattr(last, name)), None)
    named = [(attention, name) for name in PROJECTIONS] + [(last, name) for name in MLPS]
    found = [getattr(owner, name, None) for owner, name in named]
    return [module for module in found if isinstance(module, nn.Module)]


def skipping_modules(trunk: nn.Module) -> list[nn.Module]:
    """The modules of a trunk that compute only the rows that are read."""
    return [module for module in _position_wise(trunk) if _take in module._forward_pre_hooks.values()]


def skip_unread(trunk: nn.Module) -> bool:
    """Make the last layer of a trunk compute only the rows that are read; returns whether it has such modules."""
    for module in _position_wise(trunk):
        if _take not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_take)
            module.register_forward_hook(_put)
    return bool(skipping_modules(trunk))


def compute_all(trunk: nn.Module) -> None:
    """Undo `skip_unread`."""
    for module in trunk.modules():
        for hooks, ours in ((module._forward_pre_hooks, _take), (module._forward_hooks, _put)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]


def _checkpoints(trunk: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules())


def _filled(rows: Tensor, positions: int, count: int) -> Tensor:
    """Different rows (K,) and as many other positions as make them `count`, if there are so many."""
    free = torch.ones(positions, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
    return torch.cat((rows, free.nonzero().squeeze(1)[: count - rows.shape[0]]))


@contextmanager
def reading(trunk: nn.Module, index: Tensor | None, positions: int = 0) -> Iterator[None]:
    """A context in which only the flat positions `index` (repeated or not) of the output of `trunk` are valid.

    positions: how many there are, if more of them may be computed so that the number of rows is a frequent one.
    """
    # A checkpointed layer runs again in the backward pass, outside this context.
    if index is None or (trunk.training and _checkpoints(trunk)):
        yield
        return
    rows = torch.unique(index)  # a repeated row would receive its gradient twice
    kind = product_dtype(rows.device, next(trunk.parameters()).dtype)
    if (count := rows_computed(rows.shape[0], rows.device, kind)) > rows.shape[0]:
        rows = _filled(rows, max(positions, int(rows[-1]) + 1), count)
    token = _read.set(rows)
    try:
        yield
    finally:
        _read.reset(token)
