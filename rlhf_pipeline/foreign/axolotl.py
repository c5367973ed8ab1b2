"""axolotl."""

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
    lost,
    refuse,
    to,
    whole_split,
)
from rlhf_pipeline.foreign.templates import AXOLOTL, put_template

NAME = "axolotl"
LOSSES = {"ipo": "ipo_mean", "kto": "kto"}


def _stage_of(values: Mapping[str, Any]) -> str | None:
    if values.get("rl") in ("dpo", "ipo", "kto"):
        return "dpo"
    if values.get("rl") is not None or values.get("process_reward_model"):
        found = f"found {values.get('rl') or 'process_reward_model'!r}"
        raise refuse("rl", found, "dpo, ipo, kto or none", "this package has no such stage")
    return "train-rm" if values.get("reward_model") else "sft"


ENTRIES = {
    **{key: LIKE_HF[key] for key in ("learning_rate", "weight_decay", "max_grad_norm", "max_steps", "warmup_steps")},
    **{key: LIKE_HF[key] for key in ("warmup_ratio", "seed", "gradient_accumulation_steps", "gradient_checkpointing")},
    **{key: LIKE_HF[key] for key in ("adam_beta1", "adam_beta2", "adam_epsilon", "logging_steps", "save_steps")},
    **{key: LIKE_HF[key] for key in ("save_strategy", "save_total_limit", "attn_implementation", "trust_remote_code")},
    **{key: LIKE_HF[key] for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "output_dir")},
    **IDLE_HF,
    "base_model": to("model_name_or_path"),
    "revision_of_model": to("model_revision"),
    "model_type": IDLE,
    "tokenizer_type": IDLE,
    "num_labels": lost("a reward model has one score", 1),
    "strict": IDLE,
    "special_tokens.pad_token": idle("padding is neither attended to nor trained on"),
    "special_tokens.eos_token": to("eos_token"),
    "special_tokens.*": lost("the model's own tokens are used"),
    "load_in_4bit": to("load_in_4bit", {True: True, False: None}),
    "load_in_8bit": lost("4 bits or none are here", False),
    "adapter": JOINT,
    "lora_target_linear": to("lora_target_modules", {True: "all-linear", False: None}),
    "lora_modules_to_save": to("lora_modules_to_save"),
    "peft_use_dora": to("use_dora"),
    "peft_use_rslora": to("use_rslora"),
    "lora_model_dir": lost("name the adapter's model in model_name_or_path"),
    "lora_fan_in_fan_out": IDLE,
    "lora_mlp_kernel": IDLE,
    "lora_qkv_kernel": IDLE,
    "lora_o_kernel": IDLE,
    "rl": JOINT,
    "reward_model": JOINT,
    "rl_beta": to("beta"),
    "dpo_label_smoothing": to("label_smoothing"),
    "kto_desirable_weight": to("desirable_weight"),
    "kto_undesirable_weight": to("undesirable_weight"),
    "chat_template": JOINT,
    "chat_template_jinja": JOINT,
    "datasets": JOINT,
    "test_datasets": lost("evaluation is on test_split_size, or a split of the source"),
    "dataset_prepared_path": IDLE,
    "dataset_processes": IDLE,
    "shuffle_merged_datasets": IDLE,
    "val_set_size": to("test_split_size", lambda value: value or None),
    "sequence_len": to("max_length"),
    "sample_packing": to("packing", {True: True, False: None}),
    "eval_sample_packing": IDLE,
    "pad_to_sequence_len": IDLE,
    "micro_batch_size": to("per_device_train_batch_size"),
    "eval_batch_size": to("per_device_eval_batch_size"),
    "num_epochs": to("num_train_epochs"),
    "optimizer": to("optim"),
    "lr_scheduler": to("lr_scheduler_type"),
    "cosine_min_lr_ratio": lost("use lr_scheduler_type cosine_with_min_lr"),
    "train_on_inputs": to("completion_only_loss", {True: False, False: None}),
    "group_by_length": IDLE,
    "bf16": JOINT,
    "fp16": lost("use bf16, or dtype float16", False),
    "flash_attention": to("attn_implementation", {True: "flash_attention_2", False: None}),
    "xformers_attention": IDLE,
    "sdp_attention": to("attn_implementation", {True: "sdpa", False: None}),
    "early_stopping_patience": to("early_stopping_patience"),
    "local_rank": IDLE,
    "loss_watchdog_*": idle("the watches of a run look at its loss"),
    "evals_per_epoch": JOINT,
    "saves_per_epoch": JOINT,
    "eval_table_size": IDLE,
    "eval_max_new_tokens": IDLE,
    "debug": IDLE,
    "fsdp_*": IDLE,
    "liger_*": IDLE,
    "plugins": idle("plugins of axolotl are not loaded"),
    "neftune_noise_alpha": lost("no noise is added to the embeddings", 0),
}


def _complete(values: Mapping[str, Any], result: Translation) -> None:
    adapter = values.get("adapter")
    if adapter in ("lora", "qlora"):
        result.put("use_peft", True, "adapter")
        if adapter == "qlora" and "load_in_4bit" not in result.config:
            result.put("load_in_4bit", True, "adapter")
    else:
        for key in [key for key in result.config if key.startswith("lora_")]:
            del result.config[key]
        if adapter is not None:
            result.lose("adapter", adapter, "only lora and qlora are here")
    if values.get("bf16") in (True, "auto", "full"):  # the weights of a model, and of an adapter's base, are loaded so
        result.put("bf16", values["bf16"] if values["bf16"] == "auto" else True, "bf16")
        result.put("dtype", "bfloat16", "bf16")
    if values.get("rl") in LOSSES:
        result.put("loss_type", LOSSES[values["rl"]], "rl")
    _template(values, result)
    _data(values, result)
    evals, saves = values.get("evals_per_epoch"), values.get("saves_per_epoch")
    evaluates = "test_split_size" in result.config and evals
    if evaluates:
        result.put("eval_strategy", "epoch", "evals_per_epoch")
    if evals not in (None, 1):
        told = "evaluated once per epoch" if evaluates else "nothing is held out"
        result.lose("evals_per_epoch", evals, told, changes=False)
    if saves:
        result.put("save_strategy", "epoch", "saves_per_epoch")
        if saves != 1:
            result.lose("saves_per_epoch", saves, "saved once per epoch", changes=False)
    result.name(values.get("output_dir"), "output_dir")


def _template(values: Mapping[str, Any], result: Translation) -> None:
    template, text, model = values.get("chat_template"), values.get("chat_template_jinja"), values.get("base_model")
    if template in (None, "jinja"):
        if text is not None:
            result.put("chat_template" if "{" in text else "chat_template_path", text, "chat_template_jinja")
    elif template != "tokenizer_default":
        put_template(result, "chat_template", str(template), AXOLOTL, str(model))


def _data(values: Mapping[str, Any], result: Translation) -> None:
    entries = []
    for place, source in enumerate(values.get("datasets") or []):
        if not isinstance(source, dict):
            result.lose(f"datasets.{place}", source, "a mapping was expected")
            continue
        where, kind = f"datasets.{place}", str(source.get("type"))
        path = source.get("data_files") or source.get("path")
        if isinstance(path, list):
            result.lose(f"{where}.data_files", path, "one file per source")
            path = path[0]
        entries.append(whole_split(path, source.get("split", "train"), dataset_config=source.get("name")))
        columns = {"prompt": source.get("field_messages")} if result.stage == "dpo" else {}
        if result.stage == "sft":
            columns = {"messages": source.get("field_messages")}
        columns |= {key: source.get(f"field_{key}") for key in ("chosen", "rejected")}
        if kind == "bradley_terry.chat_template":
            columns |= {"prompt": source.get("field_input", "input"), "system": source.get("field_system", "system")}
            result.put("text_as_chat", True, f"{where}.type")
        found = {ours: theirs for ours, theirs in columns.items() if theirs not in (None, ours)}
        if found and result.config.setdefault("column_mapping", found) != found:
            result.lose(f"{where}.field_messages", found, "its columns differ from those of another source")
        if kind == "alpaca":
            result.put("instruction_style", "alpaca", f"{where}.type")
        elif kind == "completion":
            result.put("completion_only_loss", False, f"{where}.type")
        elif kind.partition(".")[0] not in ("chat_template", "sharegpt", "bradley_terry"):
            result.lose(f"{where}.type", kind, "its prompts have a text of their own; columns are read by their names")
        read = ("path", "type", "name", "split", "data_files", "ds_type", "field_input", "field_system")
        for key in sorted(set(source) - {*read, "field_messages", "field_chosen", "field_rejected"}):
            _inner(result, f"{where}.{key}", key, source[key])
    if entries:
        result.put("datasets", entries, "datasets")


def _inner(result: Translation, where: str, key: str, value: Any) -> None:
    same = {
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles": {"system": ["system"], "user": ["user"], "assistant": ["assistant"]},
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    if value is None or value == same.get(key):
        return
    result.lose(where, value, "messages have role and content, with the roles system, user and assistant")


TOOL = Tool(
    NAME,
    ("base_model", "micro_batch_size", "sequence_len", "adapter", "num_epochs", "sample_packing", "val_set_size", "rl"),
    ENTRIES,
    _stage_of,
    _complete,
    {
        "sft": {"num_train_epochs": 1.0, "seed": 42, "lr_scheduler_type": "cosine", "dropout": True},
        "train-rm": {"seed": 42, "lr_scheduler_type": "cosine", "reward_centering": "none"},
        "dpo": {"seed": 42, "lr_scheduler_type": "cosine"},
    },
)
