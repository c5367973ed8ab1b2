"""Frozen models that several parts of one command read: loaded once, and released at the end of the command."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

from torch import nn

KEPT_BYTES = 1 << 30
"""The limit for kept weights; a model beyond it is loaded again each time."""

Module = TypeVar("Module", bound=nn.Module)
_kept: OrderedDict[Hashable, nn.Module] | None = None  # the last used one at the end; None outside `sharing_models`


@contextmanager
def sharing_models() -> Iterator[None]:
    """Let `shared` keep models until the end of the block or the decorated function.

    Nothing is kept across runs, because the measured memory of a run must not depend on earlier runs.
    """
    global _kept
    before, _kept = _kept, OrderedDict()
    try:
        yield
    finally:
        _kept = before


def shared(key: Hashable, load: Callable[[], Module]) -> Module:
    """Return the frozen model of a key: one already loaded within `sharing_models`, or a newly loaded one.

    Args:
        key: everything that determines the result of `load`. load: returns a model with frozen parameters.
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
