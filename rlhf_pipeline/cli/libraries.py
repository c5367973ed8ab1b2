"""Import the libraries that every command with a model needs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

OPTIMIZE = "scipy.optimize"


def load_libraries() -> None:
    """Import torch, accelerate and the models of transformers with the garbage collector off.

    Their three thousand modules make about a million objects that stay in memory. The collector would scan them many
    times during the import, in every later full collection, and at the end of the process. If torch is already
    imported, this does nothing and leaves the collector of the caller's process as it is.
    """
    if "torch" in sys.modules:
        return
    resting = not gc.isenabled()
    gc.disable()
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401

        with without_scipy_optimize():
            from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

        gc.freeze()  # the collector ignores the objects that exist now
    finally:
        if not resting:
            gc.enable()


@contextmanager
def without_scipy_optimize() -> Iterator[None]:
    """Import transformers' models inside, without scipy.optimize (a quarter of a second of processor time).

    transformers imports one function of it, for the losses of object detection. Inside, a module takes the place of
    scipy.optimize; its function imports the real one when it is called, and any other name is looked up in the real
    module. Afterwards an import of scipy.optimize finds the real module.
    """

    def linear_sum_assignment(*arguments: Any, **named: Any) -> Any:
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(*arguments, **named)

    stand_in = _StandIn(OPTIMIZE)
    stand_in.__dict__.update(linear_sum_assignment=linear_sum_assignment, __path__=_Folders())
    sys.modules.setdefault(OPTIMIZE, stand_in)
    try:
        yield
    finally:
        _remove(stand_in)


def _remove(stand_in: ModuleType) -> None:
    if sys.modules.get(OPTIMIZE) is stand_in:
        del sys.modules[OPTIMIZE]


def _real() -> ModuleType:
    """The real scipy.optimize, in the place of the stand-in if that is still there."""
    if isinstance(standing := sys.modules.get(OPTIMIZE), _StandIn):
        _remove(standing)
    return import_module(OPTIMIZE)


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:  # only for names that it does not have
        if name.startswith("__") and name != "__all__":  # inspect asks every module for its __file__
            raise AttributeError(name)
        return getattr(_real(), name)


class _Folders:
    """Where Python looks for modules below scipy.optimize; it looks only if one is imported."""

    def __iter__(self) -> Iterator[str]:
        return iter(_real().__path__)
