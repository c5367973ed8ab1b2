"""Keys by other names, keys of later versions, and keys of TRL's that change nothing here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from rlhf_pipeline.config.stages import SCHEMAS, STAGES, TRAINING, DatasetEntry, RewardFunction
from rlhf_pipeline.errors import did_you_mean

ANY = object()


@dataclass(frozen=True)
class Alias:
    """Another name of a key, and why the note is given."""

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
    "lora_r": Later((None,)),
    "lora_alpha": Later((None,)),
    "lora_dropout": Later((None,)),
    "lora_target_modules": Later((None,)),
    "load_in_4bit": Later((None, False)),
    "load_in_8bit": Later((None, False)),
    "kl_target": Later((None,), ("ppo",)),
    "load_best_model_at_end": Later((None, False)),
    "report_to": Later((None, "none", [], ["none"])),
}

# What TRL's and transformers' YAMLs often carry: with these values a run here does the same without them.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
    "hub_model_id": (None,),
    "hub_strategy": (ANY,),
    "run_name": (ANY,),
    "log_level": (ANY,),
    "do_train": (True, None),
    "do_eval": (ANY,),
    "fp16": (False, None),
    "tf32": (False, None),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "save_strategy": ("steps",),
    "logging_strategy": ("steps",),
    "logging_first_step": (ANY,),
    "disable_dropout": (True,),
    "remove_unused_columns": (ANY,),
    "overwrite_output_dir": (ANY,),
    "dataset_num_proc": (ANY,),
    "dataset_text_field": ("text", None),
    "preprocessing_num_workers": (ANY,),
    "dataloader_num_workers": (ANY,),
    "gradient_checkpointing_kwargs": (ANY,),
    "dataset_streaming": (False,),
    "packing": (ANY,),
    "padding_free": (ANY,),
    "kl_estimator": ("k1",),
    "num_sample_generations": (0,),
}

_ENTRIES: dict[str, type[BaseModel]] = {"reward_functions": RewardFunction, "datasets": DatasetEntry}

REFUSED = {"output_dir": "use output_name: a name in the registry, under --home DIR or RLHF_HOME"}


def later(stage: str, key: str) -> Later | None:
    """Return the entry of a key that belongs to a later version, or None."""
    entry = LATER.get(key)
    if entry is None and key.startswith("lora_"):
        entry = Later((None,))
    return entry if entry is not None and stage in entry.stages else None


def has_no_effect(stage: str, key: str, value: Any) -> bool:
    """Return whether a run of this stage does the same without this key of TRL's."""
    if stage not in TRAINING or key not in WITHOUT_EFFECT:
        return False
    values = WITHOUT_EFFECT[key]
    return ANY in values or same(value, values)


def same(value: Any, values: tuple[Any, ...]) -> bool:
    """Return whether `value` is one of `values`, where 0 and False are different."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def shown(values: tuple[Any, ...]) -> str:
    """Return the values as a YAML file would have them, the empty ones left out."""
    told = [value for value in values if value is not None and value not in ([], ["none"])]
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in told]
    return " or ".join(texts) or "no value"


def advice_on_unknown(stage: str, key: str) -> str:
    """Return what to do about a key that this stage does not have."""
    if key in WITHOUT_EFFECT and stage in TRAINING:
        values = shown(WITHOUT_EFFECT[key])
        return f"only {values} is possible in this version: remove it"
    schema: type[BaseModel] = SCHEMAS[stage]
    owners = [other for other, fields in STAGES.items() if stage in STAGES and key in fields.model_fields]
    if owners:
        return f"it is a key of {', '.join(owners)}"
    return did_you_mean(key, [*schema.model_fields, *ALIASES[stage]]) or "remove it"


def advice_on_unknown_inside(key: str, inner: str) -> str:
    """Return what to do about a key that the entries of the list `key` do not have."""
    fields = list(_ENTRIES[key].model_fields) if key in _ENTRIES else []
    return did_you_mean(inner, fields) or (f"an entry has {', '.join(fields)}" if fields else "remove it")
