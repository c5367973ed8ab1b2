"""Frozen models that several parts of one command read: loaded once, and given up when the command ends."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

from torch import nn

KEPT_BYTES = 1 << 30
"""Weights that are kept for the next part that reads them; a model that does not fit in is loaded anew each time."""

Module = TypeVar("Module", bound=nn.Module)
_kept: OrderedDict[Hashable, nn.Module] | None = None  # the one used last at the end; None outside `sharing_models`


@contextmanager
def sharing_models() -> Iterator[None]:
    """Let `shared` keep models until the end of the block, or of the function that it decorates.

    Nothing is kept across runs: the memory that a run is billed must not depend on what ran before it.
    """
    global _kept
    before, _kept = _kept, OrderedDict()
    try:
        yield
    finally:
        _kept = before


def shared(key: Hashable, load: Callable[[], Module]) -> Module:
    """Return the frozen model of a key: loaded now, or the one that was loaded for it within `sharing_models`.

    Args:
        key: everything that decides what `load` returns. load: returns a model whose parameters are frozen.
    """
    if _kept is None:
        return load()
    if key in _kept:
        _kept.move_to_end(key)
        return cast(Module, _kept[key])
    model = load()
    assert not any(parameter.requires_grad for parameter in model.parameters()), "only frozen models are shared"
    _kept[key] = model
    while sum(map(_size, _kept.values())) > KEPT_BYTES:
        _kept.popitem(last=False)
    return model


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
