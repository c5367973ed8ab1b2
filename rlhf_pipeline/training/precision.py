"""The precision of a run, and what it keeps for the backward pass."""

from __future__ import annotations

import os

import torch
from torch import nn

from rlhf_pipeline.config.stages import ModelConfig
from rlhf_pipeline.errors import ConfigError, Fault


def has_fast_bf16(use_cpu: bool) -> bool:
    """Whether this machine multiplies bfloat16 faster than fp32: a GPU with bf16, or a CPU with AVX512-BF16."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


def uses_bf16(config: ModelConfig) -> bool:
    """Whether a run autocasts to bfloat16; `bf16: auto` means `has_fast_bf16`."""
    asked = getattr(config, "bf16", False)
    return has_fast_bf16(config.use_cpu) if asked == "auto" else bool(asked)


def bound_product_cache() -> None:
    """Let oneDNN, which multiplies bfloat16 on a CPU, keep the code of few products, unless the user says how many.

    It compiles a product for each new number of rows and keeps 1,024 of them, .5 to 1 MB each, though batches without
    padding have a new number at almost every step (findings/bf16_products_keep_memory.sh). `rows_computed` leaves few
    numbers, and 256 hold the products of the frequent ones. oneDNN reads the variable at its first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def require_checkpointing(model: nn.Module) -> None:
    """Check that an architecture can recompute its activations.

    Raises:
        ConfigError: it cannot.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not module.supports_gradient_checkpointing:
            found = f"{type(module).__name__} cannot recompute its activations"
            raise ConfigError(Fault("gradient_checkpointing", found, "false for this architecture"))
        if isinstance(module, GradientCheckpointingLayer) and not _checkpoints(type(module)):
            found = f"another package has replaced {type(module).__name__}.forward; all activations would be kept"
            fix = "do not load that package, or set gradient_checkpointing: false"
            raise ConfigError(Fault("gradient_checkpointing", found, "the layer's own forward", fix))


def _checkpoints(layer: type[nn.Module]) -> bool:
    """Whether a layer's class still has the forward that transformers checkpoints.

    Since transformers 5.2x a wrapper around `forward` checkpoints, but only while it is the class's own `forward`
    (findings/checkpointing_off_by_class_patch.sh).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if "__init_subclass__" not in vars(GradientCheckpointingLayer):
        return True
    return getattr(getattr(layer.forward, "__code__", None), "co_name", "") == "forward_with_checkpointing"


def checkpoint_activations(model: nn.Module) -> None:
    """Enable gradient checkpointing in every transformers model inside `model`.

    Layers keep only their inputs and recompute the rest in the backward pass: the same gradients for about a third more
    work.

    Raises:
        ConfigError: an architecture does not support it.
    """
    from transformers import PreTrainedModel

    require_checkpointing(model)
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            options = {"use_reentrant": False}
            if hasattr(module, "activation_checkpointing_enable"):
                module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            else:  # before transformers 5.2x
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            inside.update(map(id, module.modules()))
