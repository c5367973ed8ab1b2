"""Undo what a library's trainer leaves behind on a model and in the process.

TRL replaces `model.forward` by one that keeps the original's in a closure (`add_fused_lm_head`): a deep copy of such
a model goes on computing with the original's weights. Accelerate wraps it once more for mixed precision. The Trainer
of transformers writes `use_cache` and special tokens into the config, which would be published with the model.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()


def _configs(model: nn.Module) -> list[Any]:
    """Every distinct config object of a model, nested ones and that of generation included."""
    found = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    found += [config.get_text_config() for config in found if hasattr(config, "get_text_config")]
    found.append(getattr(model, "generation_config", None))
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())


def _values(config: Any, configs: list[Any]) -> dict[str, Any]:
    """A copy of a config's values; nested configs stay the objects that they are."""
    nested = {id(other) for other in configs}
    return {key: value if id(value) in nested else copy.deepcopy(value) for key, value in vars(config).items()}


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name.endswith("_hooks") and hasattr(value, "items")}


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """On leaving, take everything but the trained weights back to what it was on entering.

    That is, of every module: attributes that were added, `forward` and `gradient_checkpointing` on the instance, hooks,
    and training mode; and the values of every config.
    """
    modules = [
        (
            module,
            set(vars(module)),
            {name: vars(module).get(name, _ABSENT) for name in ("forward", "gradient_checkpointing")},
            module.training,
            {k: dict(v) for k, v in _hooks(module).items()},
        )
        for model in models
        for module in model.modules()
    ]
    configs = [config for model in models for config in _configs(model)]
    settings = [(config, _values(config, configs)) for config in configs]
    try:
        yield
    finally:
        for module, names, own, training, hooks in modules:
            for name in set(vars(module)) - names:
                del vars(module)[name]
            for name, value in own.items():
                if value is _ABSENT:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value
            for name, before in hooks.items():
                current = getattr(module, name)
                for key in set(current) - set(before):
                    del current[key]
            module.training = training
        for config, values in settings:
            vars(config).clear()
            vars(config).update(values)


@contextmanager
def contained() -> Iterator[None]:
    """Keep a trainer's progress bars and notes on its own future quiet, and Accelerate's shared state as it was."""
    import datasets
    from accelerate.state import GradientState

    bars = not datasets.are_progress_bars_disabled()
    variable = os.environ.get("TQDM_DISABLE")
    gradients = GradientState()
    before, synchronised = gradients.dataloader_references, gradients.sync_gradients
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        # A trainer that stops within an epoch leaves its data loader as the active one, and perhaps gradients
        # that wait for more micro-batches: the next optimizer in this process would not step.
        gradients.dataloader_references, gradients.sync_gradients = before, synchronised
        if bars:
            datasets.enable_progress_bars()
        if variable is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = variable
