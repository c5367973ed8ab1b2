"""Frozen linear layers in 4 bits, by bitsandbytes (QLoRA, Dettmers et al. 2023).

A layer computes x D^T + b, where D is the dequantised weight: 16 constants times the scale of each block of 64.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from rlhf_pipeline.config.adapter import INSTALL, FourBits
from rlhf_pipeline.errors import BadInput, ConfigError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""The number of weights that share a scale."""
# At its import, also by peft, it says that a kernel was not loaded from the hub; `settle` keeps away from that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
_TRACES = ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method")


def in_four_bits(module: nn.Module) -> bool:
    """Whether a module is a linear layer in 4 bits."""
    return type(module).__name__ == "Linear4bit"


def entries(parameter: torch.Tensor) -> int:
    """The number of entries of a weight; one in 4 bits is stored as half as many bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _settings(how: FourBits) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=how.quant_type, bnb_4bit_use_double_quant=how.nested
    )


def require_bitsandbytes(label: object) -> None:
    """Check that a model whose weights are held in 4 bits can be read here.

    Raises:
        BadInput: there is no bitsandbytes.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(f"{label}: its weights are held in 4 bits, which needs the package bitsandbytes: {INSTALL}")


def loading_in(how: FourBits) -> dict[str, Any]:
    """The options of `from_pretrained` that quantise weights as they are read, on the CPU."""
    return {"quantization_config": _settings(how), "device_map": {"": "cpu"}}


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers in 4 bits of a model.

    Raises:
        ConfigError: rows of a layer are not whole blocks of 64. bitsandbytes would dequantise them wrongly on a CPU.
    """
    for path, module in model.named_modules():
        if in_four_bits(module):
            layer = cast(Any, module)
            if layer.in_features % BLOCK:
                found = f"{path} has {layer.in_features} inputs, with which bitsandbytes computes wrongly on a CPU"
                raise ConfigError(Fault("load_in_4bit", found, f"a multiple of {BLOCK}", "use load_in_4bit: false"))
            yield layer


def settle(model: PreTrainedModel) -> None:
    """Make the layers in 4 bits of a loaded model compute in its number type, in training as in evaluation.

    Without gradients, on a CPU with AVX512-BF16, bitsandbytes would round activations and scales to bfloat16, so a
    policy would differ from itself in training (findings/four_bits_on_a_cpu.sh). peft and TRL take the layers for
    linear ones, which they are.

    Raises:
        ConfigError: see `_layers`.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for layer in _layers(model):
        layer.support_avx512bf16_for_cpu, layer.compute_dtype, layer.compute_type_is_set = False, dtype, True
    cast(Any, model.config).quantization_config.bnb_4bit_compute_dtype = dtype
    for name in _TRACES:
        vars(model).pop(name, None)


def dequantise(model: PreTrainedModel) -> None:
    """Replace every layer in 4 bits by a plain one with the same weights, in place; the model computes the same."""
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found, unused-ignore]
    from transformers.pytorch_utils import Conv1D

    for path, module in list(model.named_modules()):
        if not in_four_bits(module):
            continue
        layer = cast(Any, module)
        weight: Any = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain: Any
        if layer.source_cls is Conv1D and not path.endswith(".base_layer"):  # an adapter took it for a linear layer
            plain, weight = Conv1D(1, 1), weight.T.contiguous()
            plain.nf, plain.nx = layer.out_features, layer.in_features
        else:
            plain = nn.Linear(1, 1, bias=layer.bias is not None)
            plain.out_features, plain.in_features = layer.out_features, layer.in_features
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(path, plain)
    vars(model.config).pop("quantization_config", None)


def frozen_bytes(model: PreTrainedModel, width: int, how: FourBits | None) -> int:
    """Bytes of a model's weights with `width` bytes an entry, or with its linear layers in 4 bits; from its shapes.

    In 4 bits a layer of n weights takes n / 2 bytes, 4 for the scale of each block of 64 and 64 of constants. nested: 1
    for each scale, 4 for each 256 scales, and 1092 of constants.

    Raises:
        ConfigError: see `_layers`.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    whole = sum(parameter.numel() for parameter in model.parameters()) * width
    if how is None:
        return whole
    for layer in _layers(replace_with_bnb_linear(model, get_keys_to_not_convert(model), _settings(how))):
        count = layer.in_features * layer.out_features
        blocks = count // BLOCK
        scales = blocks + 4 * -(-blocks // 256) + 1028 if how.nested else 4 * blocks
        whole += count // 2 + scales + 64 - count * width
    return whole
