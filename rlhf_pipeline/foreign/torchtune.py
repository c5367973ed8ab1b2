"""torchtune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.foreign.table import (
    IDLE,
    JOINT,
    Tool,
    Translation,
    idle,
    lost,
    number,
    refuse,
    to,
    whole_split,
)

NAME = "torchtune"


def _stage_of(values: Mapping[str, Any]) -> str | None:
    loss = str(values.get("loss._component_", ""))
    for word, stage in (("PPOLoss", "ppo"), ("DPOLoss", "dpo"), ("CE", "sft"), ("CrossEntropy", "sft")):
        if word in loss:
            return stage
    if loss:
        raise refuse("loss._component_", f"found {loss}", "a loss of sft, dpo or ppo", "this package has no such stage")
    return None


ENTRIES = {
    "output_dir": JOINT,
    "model._component_": JOINT,
    "policy_model._component_": idle("the shape of a model is that of its folder"),
    "reward_and_value_model.*": idle("the shape of a model is that of its folder"),
    "model.lora_attn_modules": JOINT,
    "model.apply_lora_to_mlp": JOINT,
    "model.apply_lora_to_output": JOINT,
    "model.lora_rank": to("lora_r"),
    "model.lora_alpha": to("lora_alpha"),
    "model.lora_dropout": to("lora_dropout"),
    "model.use_dora": to("use_dora"),
    "model.quantize_base": to("load_in_4bit", {True: True, False: None}),
    "tokenizer._component_": JOINT,
    "tokenizer.max_seq_len": JOINT,
    "tokenizer.prompt_template": lost("set chat_template"),
    **dict.fromkeys(
        ("tokenizer.path", "tokenizer.merges_file", "tokenizer.special_tokens_path"),
        idle("the tokenizer is that of the model's folder"),
    ),
    "checkpointer.checkpoint_dir": to("model_name_or_path"),
    "ref_policy_checkpointer.checkpoint_dir": JOINT,
    "value_checkpointer.checkpoint_dir": JOINT,
    "reward_checkpointer.checkpoint_dir": to("reward_model_path"),
    **{
        f"{of}checkpointer.{key}": IDLE
        for of in ("", "ref_policy_", "value_", "reward_")
        for key in ("_component_", "checkpoint_files", "output_dir", "model_type", "recipe_checkpoint")
    },
    "dataset.*": JOINT,
    "seed": to("seed"),
    "shuffle": lost("examples are shuffled in each epoch", True),
    "batch_size": JOINT,
    "gradient_accumulation_steps": JOINT,
    "epochs": to("num_train_epochs"),
    "max_steps_per_epoch": JOINT,
    "optimizer._component_": JOINT,
    "optimizer.lr": to("learning_rate"),
    "optimizer.weight_decay": to("weight_decay"),
    "optimizer.eps": to("adam_epsilon"),
    "optimizer.fused": IDLE,
    "optimizer_in_bwd": IDLE,
    "mixed_precision._component_": IDLE,
    "mixed_precision.enabled": lost("only bfloat16 is here", False),
    "lr_scheduler._component_": JOINT,
    "lr_scheduler.num_warmup_steps": to("warmup_steps"),
    "loss._component_": JOINT,
    "loss.beta": to("beta"),
    "loss.label_smoothing": to("label_smoothing"),
    "loss.loss_type": to("loss_type"),
    "loss.epsilon": to("cliprange"),
    "loss.value_coeff": to("vf_coef"),
    "loss.value_clip_range": to("cliprange_value"),
    "clip_grad_norm": to("max_grad_norm"),
    "dtype": JOINT,
    "enable_activation_checkpointing": to("gradient_checkpointing", {True: True, False: None}),
    "num_steps": to("total_episodes"),
    "ppo_epochs": to("num_ppo_epochs"),
    "ppo_batch_size": JOINT,
    "forward_batch_size": IDLE,
    "max_generated_tokens": to("response_length"),
    "temperature": to("temperature"),
    "top_k": lost("responses are sampled from the whole distribution"),
    "min_response_length": lost("there is no penalty on short responses"),
    "penalise_no_eos": JOINT,
    "reward_penalty": JOINT,
    "stop_token_ids": lost("set stop_token"),
    "whiten_rewards": to("whiten_rewards"),
    "gamma": to("gamma", float),
    "lmbda": to("lam"),
    "kl_coeff": to("kl_coef"),
    "log_every_n_steps": to("logging_steps"),
    **dict.fromkeys(
        (
            *("resume_from_checkpoint", "save_adapter_weights_only", "compile", "device", "log_peak_memory_stats"),
            *("enable_activation_offloading", "metric_logger.*", "profiler.*", "log_level"),
        ),
        IDLE,
    ),
}
_SOURCES = {
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "stack_exchange_paired_dataset": "lvwerra/stack-exchange-paired",
    "hh_rlhf_helpful_dataset": "RLHFlow/HH-RLHF-Helpful-standard",
}
_LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_QWEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"llama3_tokenizer": _LLAMA, "qwen2_5_tokenizer": _QWEN}
"""What its tokenizers make of a chat: without the system message that the models' own templates add."""
_POSITIONS = {"llama3_1": 131072, "llama3_2": 131072, "llama3": 8192, "qwen2_5": 32768, "mistral": 32768}
"""The positions of a model of a module, its limit where max_seq_len is null."""
_LAYERS = {"output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")


def _complete(values: Mapping[str, Any], result: Translation) -> None:
    component = str(values.get("model._component_", "")).rpartition(".")[2]
    if "lora_" in component:
        result.put("use_peft", True, "model._component_")
        layers = [_LAYERS.get(name, name) for name in values.get("model.lora_attn_modules") or []]
        layers += _MLP if values.get("model.apply_lora_to_mlp") else ()
        layers += ["lm_head"] if values.get("model.apply_lora_to_output") else []
        result.put("lora_target_modules", layers, "model.lora_attn_modules")
        if component.startswith("qlora_"):
            result.put("load_in_4bit", True, "model._component_")
    else:
        result.lose("model._component_", component, "the shape of a model is that of its folder", changes=False)
    if str(values.get("dtype")) == "bf16":
        result.put("dtype", "bfloat16", "dtype")
    elif values.get("dtype") not in (None, "fp32"):
        result.lose("dtype", values["dtype"], "bf16 or fp32")
    _optimizer(values, result)
    if result.stage == "ppo":
        _ppo(values, result)
    else:
        result.put("per_device_train_batch_size", number(values, "batch_size", 1), "batch_size")
        steps = number(values, "gradient_accumulation_steps", 1)
        result.put("gradient_accumulation_steps", steps, "gradient_accumulation_steps")
        if most := values.get("max_steps_per_epoch"):
            result.put("max_steps", int(most * values.get("epochs", 1)), "max_steps_per_epoch")
            result.notes.append(f"max_steps {result.config['max_steps']}: if an epoch has at least {most} steps")
    _data(values, result)
    folder = str(values.get("output_dir", ""))
    if "${" not in folder:
        result.name(folder, "output_dir")


def _optimizer(values: Mapping[str, Any], result: Translation) -> None:
    kind = str(values.get("optimizer._component_", "torch.optim.AdamW"))
    names = {
        "torch.optim.AdamW": "adamw_torch",
        "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
        "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
        "bitsandbytes.optim.AdamW8bit": "adamw_bnb_8bit",
    }
    if kind in names:
        result.put("optim", names[kind], "optimizer._component_")
    else:
        result.lose("optimizer._component_", kind, "there is no such optimizer")
    schedule = values.get("lr_scheduler._component_")
    known = {"get_cosine_schedule_with_warmup": "cosine"}
    name = str(schedule).rpartition(".")[2]
    if schedule is None:
        result.put("lr_scheduler_type", "constant", "")
    elif name in known:
        result.put("lr_scheduler_type", known[name], "lr_scheduler._component_")
    else:
        result.lose("lr_scheduler._component_", schedule, "there is no such schedule")


def _ppo(values: Mapping[str, Any], result: Translation) -> None:
    rollout, step = number(values, "batch_size", 64), number(values, "ppo_batch_size", 32)
    steps = number(values, "gradient_accumulation_steps", 1)
    result.put("rollout_batch_size", rollout, "batch_size")
    result.put("num_mini_batches", max(1, rollout // step), "ppo_batch_size")
    result.put("per_device_train_batch_size", max(1, step // steps), "gradient_accumulation_steps")
    penalty = values.get("reward_penalty")
    if values.get("penalise_no_eos") and penalty is not None:
        why = "a cut response has this score here less the penalty: missing_eos_penalty subtracts it"
        result.lose("reward_penalty", penalty, why)
    if values.get("ref_policy_checkpointer.checkpoint_dir") != values.get("checkpointer.checkpoint_dir"):
        result.lose("ref_policy_checkpointer.checkpoint_dir", "", "the reference is the policy's start")
    if values.get("value_checkpointer.checkpoint_dir") != values.get("reward_checkpointer.checkpoint_dir"):
        result.put("value_init", "sft", "value_checkpointer.checkpoint_dir")


def _data(values: Mapping[str, Any], result: Translation) -> None:
    component = str(values.get("dataset._component_", "")).rpartition(".")[2]
    given = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("dataset.")}
    known = {"_component_", "source", "split", "column", "packed", "train_on_input", "max_seq_len"}
    for key, value in given.items():
        if key not in known and (key, value) != ("add_eos", result.stage != "ppo"):
            result.lose(f"dataset.{key}", value, "not in the table of torchtune")
    longest = given.get("max_seq_len") or values.get("tokenizer.max_seq_len")
    if longest is not None:
        result.put("max_length", longest, "tokenizer.max_seq_len")
    elif result.stage != "ppo":
        family = str(values.get("model._component_", "")).rpartition(".")[0].rpartition(".")[2]
        if family in _POSITIONS:
            result.put("max_length", _POSITIONS[family], "tokenizer.max_seq_len")
        else:
            result.lose("tokenizer.max_seq_len", None, "there is a limit here: set max_length to the model's positions")
    source = given.get("source") or _SOURCES.get(component)
    if source is None:
        result.lose("dataset._component_", component, "the source of this dataset is not known: set dataset_name")
        return
    result.put("datasets", [whole_split(source, given.get("split", "train"))], "dataset.source")
    tokenizer = str(values.get("tokenizer._component_", "")).rpartition(".")[2]
    if component.startswith("alpaca"):
        result.put("instruction_style", "alpaca", "dataset._component_")
        result.put("text_as_chat", True, "dataset._component_")
        result.put("completion_only_loss", not given.get("train_on_input", True), "dataset._component_")
    if result.stage == "sft" and tokenizer in TEMPLATES:
        result.put("chat_template", TEMPLATES[tokenizer], "tokenizer._component_")
    elif result.stage == "sft":
        why = "it has a chat format of its own: set chat_template"
        result.lose("tokenizer._component_", values.get("tokenizer._component_"), why)
    else:
        result.lose("tokenizer._component_", tokenizer, "the tokenizer is that of the model's folder", changes=False)
    if component == "stack_exchange_paired_dataset":
        result.put(
            "column_mapping", {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}, "dataset"
        )
        result.lose("dataset._component_", component, "it reads data/rl alone, in a prompt of its own")
    elif not component.startswith("alpaca") and component not in (
        "chat_dataset",
        "preference_dataset",
        "text_completion_dataset",
    ):
        result.lose("dataset._component_", component, "columns are read by their names")
    if given.get("packed"):
        result.put("packing", True, "dataset.packed")
    if "column" in given and given["column"] not in ("text", "prompt"):
        result.lose("dataset.column", given["column"], "set column_mapping")


_ADAMW = {"weight_decay": 0.01, "max_grad_norm": 0.0}
TOOL = Tool(
    NAME,
    ("model._component_", "policy_model._component_", "checkpointer._component_", "tokenizer._component_"),
    ENTRIES,
    _stage_of,
    _complete,
    {"sft": _ADAMW, "dpo": {**_ADAMW, "beta": 0.1}, "ppo": {**_ADAMW, "adam_epsilon": 1e-8}},
)
