"""OpenRLHF: the flags of its programs, from a shell script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.foreign.table import (
    IDLE,
    JOINT,
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

NAME = "openrlhf"
STAGES = {"train_sft": "sft", "train_rm": "train-rm", "train_dpo": "dpo", "train_ppo": "ppo", "train_ppo_ray": "ppo"}


def _stage_of(values: Mapping[str, Any]) -> str | None:
    program = str(values.get("program", "")).rpartition(".")[2]
    if program and program not in STAGES:
        raise refuse("program", f"found {program}", f"one of {', '.join(STAGES)}", "this package has no such stage")
    return STAGES.get(program)


ENTRIES = {
    "program": JOINT,
    "pretrain": to("model_name_or_path"),
    "reward_pretrain": to("reward_model_path"),
    "ref_pretrain": to("ref_model"),
    "critic_pretrain": JOINT,
    "save_path": JOINT,
    "dataset": JOINT,
    "prompt_data": JOINT,
    "dataset_probs": JOINT,
    "prompt_data_probs": JOINT,
    "train_split": JOINT,
    "prompt_split": JOINT,
    "eval_split": JOINT,
    "input_key": JOINT,
    "output_key": JOINT,
    "chosen_key": JOINT,
    "rejected_key": JOINT,
    "prompt_key": JOINT,
    "input_template": lost("the prompt is the row's own text"),
    "apply_chat_template": to("text_as_chat", {True: True, False: None}),
    "tokenizer_chat_template": to("chat_template"),
    "multiturn": to("train_on", {True: "all_assistant", False: None}),
    "pretrain_mode": to("completion_only_loss", {True: False, False: None}),
    "max_samples": to("max_train_samples"),
    "max_len": to("max_length"),
    "prompt_max_len": to("max_prompt_length"),
    "generate_max_len": to("response_length"),
    "train_batch_size": JOINT,
    "micro_train_batch_size": JOINT,
    "rollout_batch_size": JOINT,
    "n_samples_per_prompt": lost("one response is sampled per prompt", 1),
    "num_episodes": JOINT,
    "max_epochs": JOINT,
    "learning_rate": to("learning_rate"),
    "actor_learning_rate": to("learning_rate"),
    "critic_learning_rate": JOINT,
    "lr_scheduler": JOINT,
    "lr_warmup_ratio": to("warmup_steps"),
    "l2": to("weight_decay"),
    "max_norm": to("max_grad_norm"),
    "adam_betas": JOINT,
    "seed": to("seed"),
    "bf16": JOINT,
    "param_dtype": JOINT,
    "fp16": lost("use bf16, or dtype float16", False),
    "beta": to("beta"),
    "ipo": to("loss_type", {True: "ipo_mean", False: None}),
    "label_smoothing": to("label_smoothing"),
    "nll_loss_coef": to("sft_weight", lambda value: value or None),
    "loss": lost("the loss is -log sigmoid of the difference", "sigmoid"),
    "compute_fp32_loss": IDLE,
    "margin_loss": to("use_margin", {True: True, False: None}),
    "aux_loss_coef": lost("there is no loss that balances experts", 0),
    "value_head_prefix": IDLE,
    "init_kl_coef": to("kl_coef"),
    "kl_target": to("kl_target"),
    "kl_horizon": to("kl_horizon"),
    "kl_estimator": lost("the KL in the reward is k1", "k1"),
    "eps_clip": to("cliprange"),
    "value_clip": to("cliprange_value"),
    "gamma": to("gamma"),
    "lambd": to("lam"),
    "temperature": to("temperature"),
    "top_p": lost("responses are sampled from the whole distribution", 1, 1.0),
    "advantage_estimator": to("algorithm", {"gae": None, "rloo": "rloo", "group_norm": "grpo"}),
    "normalize_reward": to("normalize_rewards", {True: True, False: None}),
    "ptx_coef": JOINT,
    "pretrain_data": JOINT,
    "pretrain_data_probs": JOINT,
    "pretrain_split": JOINT,
    "freezing_actor_steps": to("critic_warmup_steps", lambda value: max(0, value)),
    "lora_rank": JOINT,
    "lora_alpha": JOINT,
    "lora_dropout": JOINT,
    "target_modules": JOINT,
    "load_in_4bit": to("load_in_4bit", {True: True, False: None}),
    "gradient_checkpointing": to("gradient_checkpointing"),
    "flash_attn": to("attn_implementation", {True: "flash_attention_2", False: None}),
    "attn_implementation": to("attn_implementation"),
    "packing_samples": idle("micro-batches never hold padding; a step keeps its examples"),
    "logging_steps": to("logging_steps"),
    "eval_steps": lost("give eval_strategy and eval_steps", -1),
    "save_steps": to("save_steps", lambda value: value if value > 0 else None),
    "max_ckpt_num": to("save_total_limit"),
    **dict.fromkeys(
        (
            *("zero_stage", "adam_offload", "ref_offload", "load_checkpoint", "ckpt_path", "disable_fast_tokenizer"),
            *("micro_rollout_batch_size", "gradient_checkpointing_use_reentrant", "grad_accum_dtype", "save_hf_model"),
            *("overlap_comm", "use_wandb", "wandb_*", "use_tensorboard", "max_ckpt_mem", "zpg", "vllm_*", "ref_num_*"),
            *(
                "actor_num_*",
                "critic_num_*",
                "reward_num_*",
                "colocate_*",
                "deepspeed_*",
                "enforce_eager",
                "local_rank",
            ),
        ),
        IDLE,
    ),
}


def _complete(values: Mapping[str, Any], result: Translation) -> None:
    size, micro = number(values, "train_batch_size", 128), number(values, "micro_train_batch_size", 8)
    result.put("per_device_train_batch_size", micro, "micro_train_batch_size")
    if result.stage == "ppo":
        _ppo(values, result, size)
    else:
        result.put("gradient_accumulation_steps", max(1, size // micro), "train_batch_size")
        epochs = {"sft": 2.0, "train-rm": 1.0, "dpo": 1.0}[result.stage]
        result.put("num_train_epochs", float(values.get("max_epochs", epochs)), "max_epochs")
    if values.get("bf16") or str(values.get("param_dtype")) == "bf16":
        result.put("bf16", True, "bf16")  # DeepSpeed computes in bfloat16 and keeps the weights in float32
    betas = listed(values.get("adam_betas") or [0.9, 0.95])
    result.put("adam_beta1", float(betas[0]), "adam_betas")
    result.put("adam_beta2", float(betas[1]), "adam_betas")
    schedule = values.get("lr_scheduler", "cosine_with_min_lr")
    result.put("lr_scheduler_type", schedule, "lr_scheduler")
    if schedule == "cosine_with_min_lr":
        result.put("lr_scheduler_kwargs", {"min_lr_rate": 0.1}, "lr_scheduler")
    if number(values, "lora_rank", 0):
        result.put("use_peft", True, "lora_rank")
        result.put("lora_r", values["lora_rank"], "lora_rank")
        result.put("lora_alpha", values.get("lora_alpha", 16), "lora_alpha")
        result.put("lora_dropout", values.get("lora_dropout", 0.0), "lora_dropout")
        modules = values.get("target_modules", "all-linear")
        result.put("lora_target_modules", modules if modules == "all-linear" else listed(modules), "target_modules")
    result.name(values.get("save_path"), "save_path")
    _data(values, result)


def _ppo(values: Mapping[str, Any], result: Translation, size: int) -> None:
    rollout = number(values, "rollout_batch_size", 1024)
    result.put("rollout_batch_size", rollout, "rollout_batch_size")
    result.put("num_mini_batches", max(1, rollout // size), "train_batch_size")
    result.put("num_ppo_epochs", number(values, "max_epochs", 1), "max_epochs")
    rate = values.get("critic_learning_rate", 9e-6)
    if rate != result.config.get("learning_rate"):
        result.lose("critic_learning_rate", rate, "actor and critic have one learning rate")
    critic = values.get("critic_pretrain")
    if critic is not None and critic != values.get("reward_pretrain"):
        result.put("value_init", "sft", "critic_pretrain")
        if critic != values.get("pretrain"):
            result.lose("critic_pretrain", critic, "the critic starts from the reward model or the policy")
    passes, prompts = number(values, "num_episodes", 1), values.get("max_samples")
    if isinstance(prompts, int):
        result.put("total_episodes", prompts * passes, "max_samples")
        result.notes.append(
            f"total_episodes {prompts * passes}: {passes} x max_samples, if the data have so many prompts"
        )
    else:
        result.lose("num_episodes", passes, "set total_episodes: the number of prompts times the number of passes")
    if values.get("normalize_reward"):
        result.notes.append(
            "normalize_rewards: by the scores of the run; OpenRLHF has mean and deviation in the reward model's files"
        )
    _stream(values, result)


def _stream(values: Mapping[str, Any], result: Translation) -> None:
    """The pretraining data beside the prompts, with OpenRLHF's default weight; without data it reads none."""
    names = listed(values.get("pretrain_data") or [])
    if not names:
        return
    entries = [whole_split(name, values.get("pretrain_split") or "train") for name in names]
    for entry, share in zip(entries, listed(values.get("pretrain_data_probs") or []), strict=False):
        entry["weight"] = float(share)
        entry.pop("fraction", None)
    result.put("ptx_coef", float(values.get("ptx_coef", 0.05)), "ptx_coef")
    result.put("ptx_dataset", entries, "pretrain_data")


def _data(values: Mapping[str, Any], result: Translation) -> None:
    names = listed(values.get("dataset") or values.get("prompt_data") or [])
    shares = listed(values.get("dataset_probs") or values.get("prompt_data_probs") or [])
    split = values.get("train_split") or values.get("prompt_split") or "train"
    entries = [whole_split(name, split) for name in names]
    if len(entries) > 1 and shares:
        for entry, share in zip(entries, shares, strict=False):
            entry["weight"] = float(share)
            del entry["fraction"]
        result.lose(
            "dataset_probs", ",".join(map(str, shares)), "used as weights, without repeated examples", len(entries) > 1
        )
    if entries:
        result.put("datasets", entries, "dataset")
    ours = {"sft": {"input_key": "prompt", "output_key": "completion"}, "ppo": {"input_key": "prompt"}}
    keys = ours.get(result.stage, {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"})
    if result.stage == "sft" and not values.get("output_key"):
        keys = {"input_key": "messages" if values.get("apply_chat_template") else "text"}
    columns = {name: values[key] for key, name in keys.items() if values.get(key) not in (None, name)}
    if columns:
        result.put("column_mapping", columns, next(iter(keys)))


_COMMON = {"weight_decay": 0.0, "warmup_steps": 0.03, "seed": 42}
TOOL = Tool(
    NAME,
    ("micro_train_batch_size", "train_batch_size", "pretrain", "zero_stage", "save_path", "max_epochs", "max_len"),
    ENTRIES,
    _stage_of,
    _complete,
    {
        "sft": {**_COMMON, "learning_rate": 5e-6, "max_length": 2048, "dropout": True},
        "train-rm": {**_COMMON, "learning_rate": 9e-6, "max_length": 512, "reward_centering": "none"},
        "dpo": {**_COMMON, "learning_rate": 1e-5, "max_length": 512},
        "ppo": {**_COMMON, "learning_rate": 1e-6, "kl_coef": 0.01, "lam": 1.0, "adam_epsilon": 1e-8},
    },
)
