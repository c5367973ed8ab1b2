"""Train a language model by RLHF (SFT, reward model, PPO) and by DPO on the same data, and compare."""

import sys
from types import ModuleType
from typing import Any

from rlhf_pipeline import api
from rlhf_pipeline.api import LoadedModel, collect, compare, dpo, load, ppo, run, sft, train_rm

__version__ = "0.1.0"
__all__ = ["LoadedModel", "collect", "compare", "dpo", "load", "ppo", "run", "sft", "train_rm"]


class _CallableRoom(ModuleType):
    """The package `rlhf_pipeline.compare`, which can be called like the function of the same name."""

    __call__ = staticmethod(api.compare)


class _Package(ModuleType):
    """This package: Python binds `compare` to the package of that name once that is imported; it can be called too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compare" and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
