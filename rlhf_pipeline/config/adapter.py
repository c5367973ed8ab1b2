"""Checks of the keys of an adapter, which `config/training.py` declares."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from rlhf_pipeline.config.base import no_package
from rlhf_pipeline.errors import Fault

ADAPTER_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
    *("use_rslora", "use_dora", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "shared_base"),
)
QuantType = Literal["nf4", "fp4"]
INSTALL = "pip install 'bitsandbytes>=0.50'"


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
    @property
    def bnb_4bit_quant_type(self) -> QuantType: ...
    @property
    def use_bnb_nested_quant(self) -> bool: ...


@dataclass(frozen=True)
class FourBits:
    """How frozen weights are held in 4 bits (QLoRA, Dettmers et al. 2023).

    A weight is c_i s_b: one of 16 constants of `quant_type`, times the scale of its block of 64. nested: the scales
    have 8 bits instead of 32 (the paper's double quantisation).
    """

    quant_type: QuantType = "nf4"
    nested: bool = False

    @staticmethod
    def of(config: HasAdapter) -> FourBits | None:
        """What a config asks for; None: weights as they are stored."""
        return FourBits(config.bnb_4bit_quant_type, config.use_bnb_nested_quant) if config.load_in_4bit else None

    @property
    def keys(self) -> str:
        """The keys of a config that ask for it."""
        nested = ", use_bnb_nested_quant: true" if self.nested else ""
        return f"load_in_4bit: true, bnb_4bit_quant_type: {self.quant_type}{nested}"


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
        yield no_package("use_peft", True, "peft", "pip install 'peft>=0.21', or train all weights")
    if config.model_name_or_path is None:
        yield Fault("use_peft", "found true, but there is no model to put an adapter on", "model_name_or_path")
    if config.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        yield no_package("load_in_4bit", True, "bitsandbytes", f"{INSTALL}, or dtype: bfloat16")
    elif not config.load_in_4bit:
        for key, default in (("bnb_4bit_quant_type", "nf4"), ("use_bnb_nested_quant", False)):
            if getattr(config, key) != default:
                yield Fault(key, "found without load_in_4bit, so it has no effect", "load_in_4bit: true with it")
