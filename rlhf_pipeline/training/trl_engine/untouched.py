"""Undo a library trainer's changes to a model and to the process.

TRL replaces `model.forward` by a function that holds the original one in a closure (`add_fused_lm_head`), so a deep
copy of such a model computes with the original's weights. Accelerate wraps it again for mixed precision. The Trainer of
transformers writes `use_cache` and special tokens into the config, which would be published with the model.
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
    """Every distinct config object of a model, including nested ones and the generation config."""
    found = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    found += [config.get_text_config() for config in found if hasattr(config, "get_text_config")]
    found.append(getattr(model, "generation_config", None))
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())


def _values(config: Any, configs: list[Any]) -> dict[str, Any]:
    """A copy of a config's values; nested configs are not copied."""
    nested = {id(other) for other in configs}
    return {key: value if id(value) in nested else copy.deepcopy(value) for key, value in vars(config).items()}


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name.endswith("_hooks") and hasattr(value, "items")}


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """A context that on exit restores everything except the trained weights.

    It restores the values of every config and, for every module, added attributes, `forward` and
    `gradient_checkpointing` on the instance, hooks, and training mode.
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
    """A context without a trainer's progress bars and deprecation notes; it restores Accelerate's shared state."""
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
        # A trainer that stops within an epoch leaves its data loader active, and perhaps gradients that wait for
        # more micro-batches, so the next optimizer in this process would not step.
        gradients.dataloader_references, gradients.sync_gradients = before, synchronised
        if bars:
            datasets.enable_progress_bars()
        if variable is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = variable
