"""open-instruct: `finetune.py` and `dpo_tune_cache.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.foreign.table import (
    IDLE,
    IDLE_HF,
    JOINT,
    LIKE_HF,
    Tool,
    Translation,
    idle,
    listed,
    lost,
    to,
    whole_split,
)

NAME = "open-instruct"
TULU = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + "
    "eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ '<|' + message['role'] + '|>\\n' + "
    "message['content'] + '\\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    "{% endif %}{% endfor %}"
)
"""The chat template that it calls tulu, its default."""


def _stage_of(values: Mapping[str, Any]) -> str | None:
    return "dpo" if any(key.startswith("dpo_") for key in values) else None


ENTRIES = {
    **LIKE_HF,
    **IDLE_HF,
    "tokenizer_name": JOINT,
    "tokenizer_revision": lost("the model's own tokenizer is used"),
    "use_slow_tokenizer": idle("fast and slow tokenizers give the same tokens"),
    "use_flash_attn": to("attn_implementation", {True: "flash_attention_2", False: "eager"}),
    "dataset_name": JOINT,
    "dataset_config_name": JOINT,
    "dataset_mixer": JOINT,
    "dataset_mixer_list": JOINT,
    "dataset_mixer_list_splits": JOINT,
    "train_file": JOINT,
    "dataset_mix_dir": IDLE,
    "dataset_local_cache_dir": IDLE,
    "max_train_samples": to("max_train_samples"),
    "max_seq_length": to("max_length"),
    "max_train_steps": to("max_steps"),
    "add_bos": idle("the first token is that of the model's tokenizer and template"),
    "chat_template_name": JOINT,
    "use_lora": to("use_peft", {True: True, False: None}),
    "use_qlora": to("load_in_4bit", {True: True, False: None}),
    "lora_rank": to("lora_r"),
    "clip_grad_norm": to("max_grad_norm", lambda value: max(0.0, value)),
    "use_8bit_optimizer": to("optim", {True: "adamw_8bit", False: None}),
    "fused_optimizer": IDLE,
    "reduce_loss": lost("a step's loss is the mean over all its tokens", "mean"),
    "load_balancing_loss": lost("there is no loss that balances experts", False),
    "dpo_beta": to("beta"),
    "dpo_loss_type": to("loss_type", {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}),
    "dpo_label_smoothing": to("label_smoothing"),
    "dpo_use_paged_optimizer": IDLE,
    "checkpointing_steps": JOINT,
    "keep_last_n_checkpoints": to("save_total_limit", lambda value: None if value < 0 else value),
    "with_tracking": IDLE,
    "hf_metadata_dataset": IDLE,
    "hf_*": IDLE,
    "exp_name": IDLE,
    "timeout": IDLE,
    "try_*": IDLE,
}


def _complete(values: Mapping[str, Any], result: Translation) -> None:
    named = values.get("tokenizer_name")
    if named not in (None, values.get("model_name_or_path")):
        result.lose("tokenizer_name", named, "the model's own tokenizer is used")
    template = values.get("chat_template_name", "tulu")
    if template == "tulu":
        result.put("chat_template", TULU, "chat_template_name")
    else:
        result.lose("chat_template_name", template, "set chat_template")
    result.put("dtype", "bfloat16", "")
    every = values.get("checkpointing_steps")
    if every == "epoch":
        result.put("save_strategy", "epoch", "checkpointing_steps")
    elif every is not None:
        result.put("save_steps", int(every), "checkpointing_steps")
    if result.config.get("use_peft"):
        layers = ["q_proj", "o_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]
        for key, value in {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "lora_target_modules": layers}.items():
            if key not in result.config:
                result.put(key, value, "use_lora")
    folder = str(values.get("output_dir", "")).strip("/")
    if folder not in ("", "output"):
        result.name(values["output_dir"], "output_dir")
    _data(values, result)


def _data(values: Mapping[str, Any], result: Translation) -> None:
    mixer = values.get("dataset_mixer")
    pairs = list(mixer.items()) if isinstance(mixer, dict) else []
    flat = listed(values.get("dataset_mixer_list") or [])
    pairs += list(zip(flat[::2], flat[1::2], strict=False))
    if values.get("dataset_name"):
        pairs.append((values["dataset_name"], 1.0))
    if values.get("train_file"):
        pairs.append((values["train_file"], 1.0))
    splits = listed(values.get("dataset_mixer_list_splits") or ["train"])
    entries = []
    for place, (name, size) in enumerate(pairs):
        split = splits[place] if place < len(splits) else splits[0]
        # An absolute size has no point in its text; 1.0 and below is a share.
        size = float(size) if isinstance(size, float) or "." in str(size) else int(size)
        entry = whole_split(name, split, dataset_config=values.get("dataset_config_name"))
        if isinstance(size, int) or size > 1:
            entry |= {"max_samples": int(size)}
        else:
            entry["fraction"] = size
        entries.append(entry)
    if entries:
        result.put("datasets", entries, "dataset_mixer")


TOOL = Tool(
    NAME,
    (
        *("use_flash_attn", "use_slow_tokenizer", "with_tracking", "checkpointing_steps", "dataset_mixer_list"),
        *("dpo_beta", "dpo_loss_type", "add_bos", "tokenizer_name", "keep_last_n_checkpoints", "hf_metadata_dataset"),
    ),
    ENTRIES,
    _stage_of,
    _complete,
    {
        "sft": {"num_train_epochs": 2.0, "max_grad_norm": 0.0, "warmup_steps": 0.03, "seed": 42, "dropout": True},
        "dpo": {
            "num_train_epochs": 2.0,
            "max_grad_norm": 0.0,
            "warmup_steps": 0.03,
            "seed": 42,
            "learning_rate": 2e-5,
        },
    },
    whole=frozenset({"dataset_mixer"}),
)
