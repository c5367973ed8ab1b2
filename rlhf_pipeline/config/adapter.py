"""Checks of the keys of an adapter, which `config/training.py` declares."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Protocol

from rlhf_pipeline.errors import Fault

ADAPTER_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
    *("use_rslora", "use_dora", "load_in_4bit", "shared_base"),
)


class HasAdapter(Protocol):
    """A config with the keys of an adapter."""

    @property
    def model_fields_set(self) -> set[str]: ...
    @property
    def model_name_or_path(self) -> str | None: ...
    @property
    def use_peft(self) -> bool: ...
    @property
    def load_in_4bit(self) -> bool: ...


def check_adapter(config: HasAdapter) -> Iterator[Fault]:
    """Yield the faults of an adapter that cannot be trained here, and of its keys without `use_peft`."""
    if not config.use_peft:
        named = [key for key in ADAPTER_KEYS if key in config.model_fields_set]
        on = [key for key in named if getattr(config, key) is True]
        # Someone who writes use_peft: false knows that the sizes of an adapter have no effect.
        for key in on if "use_peft" in config.model_fields_set else named:
            yield Fault(key, "found without use_peft, so all weights would be trained", "use_peft: true with it")
        return
    if importlib.util.find_spec("peft") is None:
        found = "found true, but there is no package peft in this environment"
        yield Fault("use_peft", found, "peft installed", "pip install 'peft>=0.21', or train all weights")
    if config.model_name_or_path is None:
        yield Fault("use_peft", "found true, but there is no model to put an adapter on", "model_name_or_path")
    if config.load_in_4bit:
        found = "weights in 4 bits need bitsandbytes and a GPU, which this version does not support"
        yield Fault("load_in_4bit", found, "false", "dtype: bfloat16 halves the memory of the frozen weights")
