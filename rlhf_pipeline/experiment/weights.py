"""Count the weights of a run's models, and the memory that training takes for them, without loading them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.optim import OPTIMIZERS
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig, SftConfig, TrainingConfig
from rlhf_pipeline.data.world import VOCABULARY
from rlhf_pipeline.models.needs import require_kernel
from rlhf_pipeline.registry.adapters import chain_of, four_bits_of
from rlhf_pipeline.registry.references import Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}


def parameters_of(resolved: Resolved) -> int | None:
    """Number of parameters, from the headers of the weight files."""
    from safetensors import safe_open

    if resolved.path is None:
        return None
    count = 0
    for path in resolved.path.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count or None


def new_parameters(config: SftConfig) -> int:
    """Number of parameters of a model from scratch, counted without allocating it."""
    import torch

    from rlhf_pipeline.models.loading import model_of_config, new_config

    assert config.model_init is not None and config.tokenizer_init is not None  # `check_start` of the config
    vocabulary = config.tokenizer_init.get("vocab_size") or len(VOCABULARY)
    described = new_config(config.model_init, dropout=config.dropout, vocab_size=vocabulary)
    if config.attn_implementation is not None:
        require_kernel(described, config.attn_implementation)
    with torch.device("meta"):
        model = model_of_config(described)
    return sum(parameter.numel() for parameter in model.parameters())


def _without_weights(parent: Resolved) -> PreTrainedModel:
    """The whole model below a model, on torch's meta device."""
    import torch
    from transformers import AutoConfig

    from rlhf_pipeline.models.loading import model_of_config

    whole, _ = chain_of(parent)
    described = AutoConfig.from_pretrained(whole.location, revision=whole.revision)
    with torch.device("meta"):
        return model_of_config(described)


def bytes_in_4_bits(config: TrainingConfig, parents: Mapping[str, Resolved]) -> dict[str, int]:
    """Bytes of the frozen weights of the models that are held in 4 bits, by role."""
    from rlhf_pipeline.models.four_bits import frozen_bytes

    held = {role: four_bits_of(parent) for role, parent in parents.items()}
    if config.use_peft:
        held["base"] = FourBits.of(config)
    width = BYTES[config.dtype]
    return {role: frozen_bytes(_without_weights(parents[role]), width, how) for role, how in held.items() if how}


def training_memory(
    parameters: int,
    adapter: int | None,
    config: TrainingConfig,
    in_4_bits: Mapping[str, int] = MappingProxyType({}),
    parts: int = 1,
) -> float:
    """Bytes of weights, gradients and the optimizer's state, and of the frozen models, without activations.

    adapter: parameters of the adapter that is trained on frozen weights; None: all weights are trained.
    in_4_bits: bytes of the frozen weights of models held in 4 bits, by role. parts: processes that divide the weights.
    """
    optim, width = OPTIMIZERS[config.optim], BYTES[config.dtype]
    count, own = (parameters, width) if adapter is None else (adapter, 4)  # adapters are in fp32
    state = optim.state if optim.package else optim.state * own / 4  # torch's has the type of the weights
    trained, frozen = round(count * (2 * own + state)), 0  # weights, gradients, state
    base, judge = (in_4_bits.get(role, parameters * width) for role in ("base", "judge"))
    # Without reward models, the reward functions are counted as one (upper bound).
    rewards = [role for role in config.parents() if role.startswith("reward_model")] or ["reward_model"]
    reward = sum(in_4_bits.get(role, parameters * width) for role in rewards)
    referred = isinstance(config, PpoConfig) or (isinstance(config, DpoConfig) and config.needs_reference)
    if isinstance(config, DpoConfig) and referred:
        frozen = base
    if isinstance(config, PpoConfig):  # the reference, the reward models and the judge
        frozen = base + reward + judge * ("judge" in config.parents())
        trained *= 2 if config.separate_critic else 1
    if adapter is not None:
        # Undivided, actor and reference, and critic and reward model, have the same weights; with shared_base all four.
        shared_base = isinstance(config, PpoConfig) and config.shared_base
        frozen = max(frozen - reward * shared_base, base)
        if parts > 1:  # divided, each model has weights of its own
            critic = isinstance(config, PpoConfig) and config.separate_critic
            frozen += base * referred + reward * (shared_base + critic)
    whole = 0
    if isinstance(config, PpoConfig) and parts > 1:  # in every process: the judge, and the actor while it samples
        whole = judge * ("judge" in config.parents())
        frozen, whole = frozen - whole, whole + parameters * width
    return (trained + frozen) / parts + whole
