"""Aliases of keys, keys of later versions, and keys of transformers and TRL that this package does not use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from rlhf_pipeline.config.ppo import RewardFunction
from rlhf_pipeline.config.stages import SCHEMAS, STAGES, TRAINING
from rlhf_pipeline.config.training import DatasetEntry
from rlhf_pipeline.errors import did_you_mean


@dataclass(frozen=True)
class Alias:
    """Another name of a key, and the reason in its note."""

    canonical: str
    note: str


def _old(canonical: str) -> Alias:
    return Alias(canonical, f"an old name of {canonical}")


def _other(canonical: str) -> Alias:
    return Alias(canonical, f"another name of {canonical}")


_COMMON_ALIASES = {
    "torch_dtype": _old("dtype"),
    "warmup_ratio": Alias("warmup_steps", "an old name of warmup_steps, where a value below 1 is a fraction"),
    "evaluation_strategy": _old("eval_strategy"),
    "max_seq_length": _old("max_length"),
    "max_completion_length": _other("response_length"),
    "max_new_tokens": _other("response_length"),
}
_SAMPLING_ALIASES = {key: _COMMON_ALIASES[key] for key in ("torch_dtype",)}
ALIASES: dict[str, dict[str, Alias]] = {
    **{stage: dict(_COMMON_ALIASES) for stage in TRAINING},
    "collect": {
        **{key: _COMMON_ALIASES[key] for key in ("torch_dtype", "max_completion_length", "max_new_tokens")},
        "model_name_or_path": _other("policy"),
        "dataset_name": _other("prompts"),
        "name": _other("output_name"),
    },
    "experiment": {},
    "evaluate": _SAMPLING_ALIASES,
    "generate": _SAMPLING_ALIASES,
    "compare": _SAMPLING_ALIASES,
    "exact": {**_SAMPLING_ALIASES, "kl_coef": _other("beta")},
}
ALIASES["ppo"] |= {
    "sft_model_path": _other("model_name_or_path"),
    "beta": _other("kl_coef"),
    "reward_model": _other("reward_model_path"),
}


@dataclass(frozen=True)
class Later:
    """A key that works in a later version: the values that mean "off", and where it belongs."""

    neutral: tuple[Any, ...]
    stages: tuple[str, ...] = TRAINING


LATER: dict[str, Later] = {
    "use_peft": Later((None, False)),
    "load_in_4bit": Later((None, False)),
    "load_in_8bit": Later((None, False)),
    "kl_target": Later((None,), ("ppo",)),
    "load_best_model_at_end": Later((None, False)),
    "report_to": Later((None, "none", [], ["none"])),
}  # and every key that starts with lora_

NOT_USED = frozenset(
    (
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"),
        *("run_name", "log_level", "logging_dir", "logging_first_step", "disable_tqdm", "num_sample_generations"),
        *("do_eval", "overwrite_output_dir", "remove_unused_columns", "padding_free", "gradient_checkpointing_kwargs"),
        *("dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers", "dataloader_pin_memory"),
    )
)
"""Keys of transformers and TRL for logging, uploading and speed; they do not change the result of training."""


@dataclass(frozen=True)
class Fixed:
    """A key with a fixed behaviour in this package: the values that match it, and what to do for other values."""

    values: tuple[Any, ...]
    instead: str


FIXED: dict[str, Fixed] = {
    "do_train": Fixed((True, None), "a stage always trains"),
    "fp16": Fixed((False, None), "use bf16, or dtype float16"),
    "tf32": Fixed((False, None), "use bf16 for speed"),
    "optim": Fixed(("adamw_torch", "adamw_torch_fused"), "every stage trains with AdamW"),
    "save_strategy": Fixed(("steps",), "save_steps sets when checkpoints are written"),
    "logging_strategy": Fixed(("steps",), "logging_steps sets when metrics are logged"),
    "dataset_text_field": Fixed(("text", None), "rename the column of the data to text"),
    "dataset_streaming": Fixed((False,), "a stage reads its data once, before it trains"),
    "packing": Fixed((False, None), "batches hold whole examples without padding, and a step keeps its examples"),
    "kl_estimator": Fixed(("k1",), "the KL in the reward is k1: the log-ratio"),
}
"""Keys whose other values would change what is trained or stored; other values are refused."""

_ENTRIES: dict[str, type[BaseModel]] = {"reward_functions": RewardFunction, "datasets": DatasetEntry}

REFUSED = {
    "output_dir": "use output_name: a name in the registry, under --home DIR or RLHF_HOME",
    "disable_dropout": "remove it: dropout is off in every stage, unless sft has `dropout: true`",
}
"""Keys that are always refused, and what to do instead."""


def later(stage: str, key: str) -> Later | None:
    """Return the entry of a key that belongs to a later version, or None."""
    entry = LATER.get(key)
    if entry is None and key.startswith("lora_"):
        entry = Later((None,))
    return entry if entry is not None and stage in entry.stages else None


def note_on_unused(stage: str, key: str, value: Any) -> str | None:
    """Return the note on a TRL key that does not change a run of this stage; None for any other key."""
    if stage not in TRAINING:
        return None
    if key in NOT_USED:
        return "not used here"
    if key in FIXED and same(value, FIXED[key].values):
        return "not used here: a run does the same without it"
    return None


def same(value: Any, values: tuple[Any, ...]) -> bool:
    """Return whether `value` is one of `values`; 0 and False are different."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def shown(values: tuple[Any, ...]) -> str:
    """Return the values as YAML text, without empty ones."""
    told = [value for value in values if value is not None and value not in ([], ["none"])]
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in told]
    return " or ".join(texts) or "no value"


def advice_on_unknown(stage: str, key: str) -> str:
    """Return what to do about a key that this stage does not have."""
    if key in FIXED and stage in TRAINING:
        return f"remove it, or set {shown(FIXED[key].values)}: {FIXED[key].instead}"
    schema: type[BaseModel] = SCHEMAS[stage]
    owners = [other for other, fields in STAGES.items() if stage in STAGES and key in fields.model_fields]
    if owners:
        return f"it is a key of {', '.join(owners)}"
    return did_you_mean(key, [*schema.model_fields, *ALIASES[stage]]) or "remove it"


def advice_on_unknown_inside(key: str, inner: str) -> str:
    """Return what to do about a key that the entries of the list `key` do not have."""
    fields = list(_ENTRIES[key].model_fields) if key in _ENTRIES else []
    return did_you_mean(inner, fields) or (f"an entry has {', '.join(fields)}" if fields else "remove it")
