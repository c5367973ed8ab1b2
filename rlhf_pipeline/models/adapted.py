"""Load a model that may be an adapter: the whole weights at the bottom, then the adapters that stand on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.adapters import load_adapter, remove_adapters, trunk_on_same_weights
from rlhf_pipeline.models.four_bits import dequantise
from rlhf_pipeline.models.merging import merge_into
from rlhf_pipeline.models.modules import sequence_head
from rlhf_pipeline.registry.adapters import chain_of, four_bits_of
from rlhf_pipeline.registry.references import Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def classifier_on(below: PreTrainedModel, resolved: Resolved) -> PreTrainedModel:
    """Make a reward model of adapters over whole weights that a language model, with adapters or not, holds in memory.

    Raises:
        BadInput: the architecture's classifier has more than a trunk and a score head, or its config cannot be used.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    _, adapters = chain_of(resolved)
    assert resolved.path is not None  # only folders hold adapters
    trunk = trunk_on_same_weights(below)
    remove_adapters(trunk, merge=False)
    config = trunk.config  # attention layers hold this very object
    own: Any = AutoConfig.from_pretrained(resolved.path) if (resolved.path / "config.json").is_file() else config
    config.num_labels, config.pad_token_id = 1, own.pad_token_id
    for key in ("reward_shift", "score_pooling"):
        setattr(config, key, getattr(own, key, None))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    model.config = config
    setattr(model, model.base_model_prefix, trunk)
    head = sequence_head(model)
    weight = next(trunk.parameters())
    head.weight = torch.nn.Parameter(weight.new_zeros(head.weight.shape), requires_grad=False)
    if left := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        found = f"{type(model).__name__} has {left[0]} besides its trunk and its head"
        raise BadInput(f"shared_base: {found}; use shared_base: false")
    for adapter in adapters:
        load_adapter(model, Path(adapter.location))
    return model


def load_adapted(
    load: Callable[..., PreTrainedModel],
    resolved: Resolved,
    *,
    dtype: str,
    merged: bool = False,
    four_bits: FourBits | None = None,
    as_stored: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load the whole weights below a model by `load` with `options`, and put its adapters on them, frozen.

    merged: add the adapters to the weights, so that all of them can be trained. four_bits: how the weights are held for
    a further adapter; those below an adapter that was trained on 4 bits are always held so. as_stored: all are read as
    their files hold them.

    Raises:
        BadInput: weights of this `dtype` are too coarse for their adapters. The errors of `chain_of`, `load` and
            `load_adapter`.
    """
    bottom, adapters = chain_of(resolved)
    four_bits = None if as_stored else four_bits_of(resolved) or four_bits
    if not adapters:
        return load(bottom.location, dtype=dtype, revision=bottom.revision, four_bits=four_bits, **options)
    model = load(
        bottom.location,
        dtype="float32" if merged else dtype,
        revision=bottom.revision,
        described_by=resolved.path,
        four_bits=four_bits,
        **options,
    )
    if merged and four_bits is not None:
        dequantise(model)
    for adapter in adapters:
        load_adapter(model, Path(adapter.location))
    if merged:
        loss = merge_into(model, torch.float32 if dtype == "auto" else getattr(torch, dtype))
        loss.require(resolved.label, "train with dtype: float32, or with use_peft: true")
        model.requires_grad_(True)
    return model
