"""Aliases of keys, keys of later versions, and keys of transformers and TRL that this package does not use."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from rlhf_pipeline.config.adapter import ADAPTER_KEYS
from rlhf_pipeline.config.rewards import RewardFunction
from rlhf_pipeline.config.stages import SCHEMAS, STAGES, TRAINING
from rlhf_pipeline.config.training import DatasetEntry
from rlhf_pipeline.errors import did_you_mean
from rlhf_pipeline.foreign.tools import meaning

_OLD = {
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
}
_QUANT = {"bnb_4bit_use_double_quant": "use_bnb_nested_quant"}
_RESPONSE = {"max_completion_length": "response_length", "max_new_tokens": "response_length"}
_SAMPLING = {"torch_dtype": "dtype"}
ALIASES: dict[str, dict[str, str]] = {
    **dict.fromkeys(TRAINING, _OLD | _QUANT | _RESPONSE),
    "ppo": {
        **_OLD,
        **_QUANT,
        **_RESPONSE,
        "sft_model_path": "model_name_or_path",
        "beta": "kl_coef",
        "reward_model": "reward_model_path",
    },
    "dpo": {
        **_OLD,
        **_QUANT,
        **_RESPONSE,
        "f_divergence_type": "f_divergence",
        "f_alpha_divergence_coef": "f_alpha",
    },
    "collect": {
        **_SAMPLING,
        **_RESPONSE,
        "model_name_or_path": "policy",
        "dataset_name": "prompts",
        "name": "output_name",
    },
    "label": {**_SAMPLING, **_RESPONSE, "dataset_name": "prompts"},
    "experiment": {},
    **dict.fromkeys(("evaluate", "generate", "compare"), _SAMPLING),
    "exact": {**_SAMPLING, "kl_coef": "beta"},
}
"""Other names of keys, by command."""


ASK_LLM = ("collect", "compare")
"""Commands in which `judge` may be a mapping with an endpoint, which stands for `llm_judge`."""


def canonical(stage: str, key: str) -> str:
    """Return the key of a command that `key` is another name of, or `key` itself."""
    return ALIASES[stage].get(key, key)


def note_on_alias(alias: str, key: str) -> str:
    """Return the note on a key that is given by another name."""
    note = f"an old name of {key}" if alias in _OLD else f"another name of {key}"
    return f"{note}, where a value below 1 is a fraction" if alias == "warmup_ratio" else note


LATER: dict[str, tuple[Any, ...]] = {
    "load_in_8bit": (None, False),
}
"""Keys that work in a later version, as every other key that starts with lora_, and the values that mean "off"."""

NOT_USED = frozenset(
    (
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_token"),
        *("hub_revision", "hub_model_revision", "push_to_hub_revision", "push_to_hub_model_id", "trackio_space_id"),
        *("run_name", "log_level", "logging_dir", "logging_first_step", "disable_tqdm", "num_sample_generations"),
        *("wandb_project", "wandb_entity", "wandb_run_group", "exp_name", "save_only_model", "save_safetensors"),
        *("do_eval", "overwrite_output_dir", "remove_unused_columns", "padding_free", "gradient_checkpointing_kwargs"),
        *("preprocessing_num_workers", "dataloader_num_workers", "dataloader_pin_memory"),
        *("ddp_timeout", "ddp_find_unused_parameters", "use_liger_kernel", "torch_compile", "packing_strategy"),
        *("accelerate_config", "local_rollout_forward_batch_size", "ds3_gather_for_generation"),
    )
)
"""Keys of transformers and TRL for logging, uploading and speed; they do not change the result of training."""


_NO_EXTRA_TOKENS = (
    {"add_special_tokens": False, "append_concat_token": False},
    {"add_special_tokens": False},
    {"append_concat_token": False},
)
FETCH = "fetch the rows that you need with `rlhf data fetch SOURCE DIR --rows N`, and set dataset_name to DIR"
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_train": ((True, None), "a stage always trains"),
    "fp16": ((False, None), "use bf16"),
    "tf32": ((False, None), "use bf16 for speed"),
    "logging_strategy": (("steps",), "logging_steps sets when metrics are logged"),
    "dataset_text_field": (("text", None), "rename the column of the data to text"),
    "dataset_streaming": ((False,), FETCH),
    "streaming": ((False,), FETCH),
    "dataset_kwargs": (_NO_EXTRA_TOKENS, "a chat template already has its special tokens"),
    "average_tokens_across_devices": ((True, None), "a step divides once by the tokens of all processes"),
    "num_processes": ((1, None), "start it with --num-processes N, or by accelerate launch"),
    "packing": ((False, None), "batches hold whole examples without padding, and a step keeps its examples"),
    "lora_task_type": (("CAUSAL_LM", "SEQ_CLS", None), "the stage sets the task of its adapter"),
    "bnb_4bit_quant_storage": (("uint8", None), "weights in 4 bits are stored as bytes"),
    "bnb_4bit_compute_dtype": ((None,), "set dtype: layers in 4 bits compute in the number type of the model"),
    "kl_estimator": (("k1",), "the KL in the reward is k1: the log-ratio"),
}
"""Keys with a fixed behaviour: the values that match it, and what to do instead of any other, which is refused."""

_ENTRIES: dict[str, type[BaseModel]] = {
    "reward_functions": RewardFunction,
    **dict.fromkeys(("datasets", "ptx_dataset"), DatasetEntry),
}

REFUSED = {
    "disable_dropout": "remove it: dropout is off in every stage, unless sft has `dropout: true`",
}
"""Keys that are always refused, and what to do instead."""


def later(stage: str, key: str) -> tuple[Any, ...] | None:
    """Return the values that mean "off" if the key belongs to a later version, or None."""
    if stage not in TRAINING:
        return None
    unknown = key.startswith("lora_") and key not in FIXED and key not in ADAPTER_KEYS
    return (None,) if unknown else LATER.get(key)


def note_on_unused(stage: str, key: str, value: Any) -> str | None:
    """Return the note on a TRL key that does not change a run of this stage; None for any other key."""
    if stage not in TRAINING or key in SCHEMAS[stage].model_fields:
        return None
    if key in NOT_USED:
        return "not used here"
    if key in FIXED and same(value, FIXED[key][0]):
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
        values, instead = FIXED[key]
        return f"remove it, or set {shown(values)}: {instead}"
    owners = [other for other, fields in STAGES.items() if stage in STAGES and key in fields.model_fields]
    if owners:
        return f"it is a key of {', '.join(owners)}"
    if stage in TRAINING and (meant := meaning(key)):
        return meant
    return did_you_mean(key, [*SCHEMAS[stage].model_fields, *ALIASES[stage]]) or "remove it"


def advice_on_unknown_inside(key: str, inner: str) -> str:
    """Return what to do about a key that the entries of the list `key` do not have."""
    fields = list(_ENTRIES[key].model_fields) if key in _ENTRIES else []
    return did_you_mean(inner, fields) or (f"an entry has {', '.join(fields)}" if fields else "remove it")
