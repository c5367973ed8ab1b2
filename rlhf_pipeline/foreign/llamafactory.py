"""LLaMA-Factory."""

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
    number,
    refuse,
    to,
    whole_split,
)
from rlhf_pipeline.foreign.templates import LLAMAFACTORY, put_template

NAME = "llamafactory"
STAGES = {"sft": "sft", "pt": "sft", "rm": "train-rm", "ppo": "ppo", "dpo": "dpo", "kto": "dpo"}


def _stage_of(values: Mapping[str, Any]) -> str | None:
    stage = values.get("stage", "sft")
    if stage not in STAGES:
        raise refuse("stage", f"found {stage!r}", f"one of {', '.join(STAGES)}", "this package has no such stage")
    return STAGES[stage]


ENTRIES = {
    **LIKE_HF,
    **IDLE_HF,
    "stage": JOINT,
    "finetuning_type": JOINT,
    "lora_rank": to("lora_r"),
    "lora_target": to("lora_target_modules", lambda value: "all-linear" if value == "all" else listed(value)),
    "additional_target": to("lora_modules_to_save", listed),
    "use_rslora": to("use_rslora"),
    "use_dora": to("use_dora"),
    "loraplus_lr_ratio": lost("LoRA+ gives the two matrices different learning rates"),
    "pissa_init": lost("there is no PiSSA initialisation", False),
    "quantization_bit": JOINT,
    "quantization_type": to("bnb_4bit_quant_type"),
    "double_quantization": to("use_bnb_nested_quant"),
    "quantization_method": lost("4-bit weights are those of bitsandbytes", "bitsandbytes", "bnb"),
    "flash_attn": to("attn_implementation", {"auto": None, "fa2": "flash_attention_2", "sdpa": "sdpa"}),
    "enable_liger_kernel": IDLE,
    "rope_scaling": lost("positions are those of the model's own config"),
    "dataset": JOINT,
    "dataset_dir": JOINT,
    "dataset_info": JOINT,
    "eval_dataset": lost("evaluation is on test_split_size, or a split of the source"),
    "template": JOINT,
    "cutoff_len": JOINT,
    "max_samples": JOINT,
    "val_size": to("test_split_size", lambda value: value or None),
    "mix_strategy": lost("the sources of datasets are joined", "concat"),
    "packing": to("packing"),
    "neat_packing": lost("packed examples never attend to each other here; set packing", False, True),
    "train_on_prompt": to("completion_only_loss", lambda value: not value),
    "mask_history": to("train_on", {True: "last", False: None}),
    "pref_beta": to("beta"),
    "pref_loss": to("loss_type", {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo_mean"}),
    "pref_ftx": to("sft_weight", lambda value: value or None),
    "dpo_label_smoothing": to("label_smoothing"),
    "kto_chosen_weight": to("desirable_weight"),
    "kto_rejected_weight": to("undesirable_weight"),
    "ref_model": to("ref_model"),
    "reward_model": to("reward_model_path"),
    "reward_model_type": idle("a reward model is a reference, with or without an adapter"),
    "ppo_epochs": to("num_ppo_epochs"),
    "ppo_buffer_size": JOINT,
    "ppo_target": to("kl_target"),
    "ppo_score_norm": to("normalize_rewards", {True: True, False: None}),
    "ppo_whiten_rewards": to("whiten_rewards"),
    "max_new_tokens": to("response_length"),
    "top_p": lost("responses are sampled from the whole distribution", 1, 1.0),
    "top_k": lost("responses are sampled from the whole distribution", 0, -1),
    "temperature": to("temperature"),
    "bf16": to("bf16"),
    "pure_bf16": to("dtype", {True: "bfloat16", False: None}),
    "fp16": lost("use bf16, or dtype float16", False),
    "neftune_noise_alpha": lost("no noise is added to the embeddings", 0),
    "plot_loss": IDLE,
    "include_num_input_tokens_seen": IDLE,
    "ray_*": IDLE,
}


def _complete(values: Mapping[str, Any], result: Translation) -> None:
    kind = values.get("finetuning_type", "lora")
    if kind == "lora":
        result.put("use_peft", True, "finetuning_type")
        rank = number(values, "lora_rank", 8)
        defaults = {"lora_r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
        for key, value in defaults.items():
            if key not in result.config:
                result.put(key, value, "finetuning_type")
        if (
            values.get("bf16") and "dtype" not in result.config
        ):  # the frozen weights are kept in the precision of training
            result.put("dtype", "bfloat16", "bf16")
    elif kind != "full":
        result.lose("finetuning_type", kind, "only lora and full are here")
    bits = values.get("quantization_bit")
    if bits == 4:
        result.put("load_in_4bit", True, "quantization_bit")
    elif bits is not None:
        result.lose("quantization_bit", bits, "only 4 bits are here")
    _data(values, result)
    template = values.get("template")
    if result.stage == "sft" and values.get("stage") == "pt":
        result.put("completion_only_loss", False, "stage")
        if template is not None:
            result.lose("template", template, "pre-training reads plain text", changes=False)
    elif template is not None:
        put_template(result, "template", template, LLAMAFACTORY, str(values.get("model_name_or_path")))
    result.name(values.get("output_dir"), "output_dir")
    cutoff = number(values, "cutoff_len", 2048)
    result.put("max_prompt_length" if result.stage == "ppo" else "max_length", cutoff, "cutoff_len")
    if result.stage == "ppo":
        _ppo(values, result)
    if values.get("stage") == "kto":
        result.put("loss_type", "kto", "stage")


def _data(values: Mapping[str, Any], result: Translation) -> None:
    """`dataset` names entries of dataset_info.json; `read_config` has put those of the file under this key."""
    known = values.get("dataset_info") or {}
    entries, most = [], values.get("max_samples")
    for name in listed(values.get("dataset") or []):
        entry = known.get(name)
        if entry is None:
            where = f"{values.get('dataset_dir', 'data')}/dataset_info.json"
            result.lose("dataset", name, f"{where}, which defines it, was not found or does not have it")
            entries.append(whole_split(name, max_samples=most))
            continue
        source = entry.get("hf_hub_url") or f"{known['']}/{entry.get('file_name', name)}"
        split = entry.get("split", "train") if entry.get("hf_hub_url") else "all"
        entries.append(whole_split(source, split, dataset_config=entry.get("subset"), max_samples=most))
        if columns := _columns(entry):
            before = result.config.setdefault("column_mapping", columns)
            if before != columns:
                result.lose("dataset", name, f"its columns {columns} differ from those of another source, {before}")
    if entries:
        result.put("datasets", entries, "dataset")
    forms = [known[name].get("formatting", "alpaca") for name in listed(values.get("dataset") or []) if name in known]
    if "alpaca" in forms and values.get("stage") != "pt":
        result.put("text_as_chat", True, "template")
        if result.stage == "sft":
            result.put("instruction_style", "plain", "dataset")


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a source that have other names than those of its format."""
    ours = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "label"}
    if entry.get("formatting") == "sharegpt":
        ours = {"messages": "conversations", "kto_tag": "label"}
    given = entry.get("columns", {})
    if entry.get("ranking"):
        ours |= {"chosen": "chosen", "rejected": "rejected"}
    kept = {ours.get(key, key): name for key, name in given.items() if ours.get(key, key) != name}
    return {key: name for key, name in kept.items() if (key, name) != ("instruction", "text")}


def _ppo(values: Mapping[str, Any], result: Translation) -> None:
    steps = number(values, "gradient_accumulation_steps", 1) * number(values, "ppo_buffer_size", 1)
    size = number(values, "per_device_train_batch_size", 8)
    result.put("rollout_batch_size", size * steps, "per_device_train_batch_size")
    result.put("num_mini_batches", steps, "ppo_buffer_size")
    result.config.pop("gradient_accumulation_steps", None)
    epochs = result.config.pop("num_train_epochs", 3.0)
    result.lose("num_train_epochs", epochs, "set total_episodes: the number of prompts times the number of passes")


TOOL = Tool(
    NAME,
    ("finetuning_type", "cutoff_len", "template", "dataset_dir", "pref_beta", "pref_loss", "lora_target", "stage"),
    ENTRIES,
    _stage_of,
    _complete,
    {
        "sft": {"learning_rate": 5e-5, "num_train_epochs": 3.0, "seed": 42, "dropout": True},
        "train-rm": {"learning_rate": 5e-5, "num_train_epochs": 3.0, "seed": 42, "reward_centering": "none"},
        "dpo": {"learning_rate": 5e-5, "num_train_epochs": 3.0, "seed": 42},
        "ppo": {"learning_rate": 5e-5, "seed": 42, "kl_coef": 0.2, "kl_target": 6.0, "adam_epsilon": 1e-8},
    },
)
