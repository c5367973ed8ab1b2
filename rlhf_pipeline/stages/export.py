"""Export a model with its adapters merged into whole weights, for tools without peft."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.adapted import load_adapted
from rlhf_pipeline.models.loading import load_causal_lm, load_sequence_classifier, save_model
from rlhf_pipeline.models.merging import merge_into
from rlhf_pipeline.registry.adapters import chain_of, four_bits_of
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.roles import role_of
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.stages.common import tokenizer_of

DTYPES = ("float32", "bfloat16", "float16")


def export_merged(registry: Registry, reference: str, target: Path, dtype: str | None) -> dict[str, Any]:
    """Write a model whose adapters are added to its weights into a new or empty folder.

    The weights are those of the base's files, also where the adapter was trained on them in 4 bits.

    dtype: of the weights; None: that of training, or float32.

    Returns:
        path, dtype, and what the merge loses: see `Merged`.

    Raises:
        BadInput: the model has no adapter, the folder is not empty, or the merge loses more than it should.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BadInput(f"--dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    resolved = registry.resolve(reference)
    whole, adapters = chain_of(resolved)
    if not adapters:
        raise BadInput(f"{resolved.label}: found whole weights, expected an adapter to merge; leave out --merge")
    for part in (whole, *adapters):
        verify_files(part)
    if dtype is None:
        trained = resolved.config.get("dtype")
        dtype = trained if trained in DTYPES else "float32"
    tokenizer = tokenizer_of(resolved)
    load: Any = load_sequence_classifier
    if role_of(resolved)[0] != "reward_model":
        load = partial(load_causal_lm, tokenizer=tokenizer)
    model = load_adapted(load, resolved, dtype="float32", as_stored=True)
    in_4_bits = None if four_bits_of(resolved) is None else load_adapted(load, resolved, dtype="float32")
    merged = merge_into(model, getattr(torch, dtype), in_4_bits=in_4_bits)
    fix = "use --dtype float32" if dtype != "float32" else "these adapters cannot be merged; read them with peft"
    merged.require(f"{resolved.label} in {dtype}", fix)
    loss = {"dtype": dtype, "distance": merged.distance, "effect": merged.effect, "share": merged.share}
    path = registry.export(resolved, target, lambda folder: save_model(model, tokenizer, folder), merge=loss)
    return {"path": str(path), **loss, "summary": merged.summary}
