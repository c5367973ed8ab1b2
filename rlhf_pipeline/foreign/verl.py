"""verl: `key=value` words of a shell script, or a YAML file."""

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
    name_of,
    number,
    to,
    whole_split,
)

NAME = "verl"


def _stage_of(values: Mapping[str, Any]) -> str | None:
    program = str(values.get("program", ""))
    if "sft" in program or "model.partial_pretrain" in values:
        return "sft"
    return "ppo" if "ppo" in program or "actor_rollout_ref.model.path" in values else None


ENTRIES = {
    "program": JOINT,
    "data.train_files": JOINT,
    "data.val_files": idle("evaluation is on test_split_size, or a split of the source"),
    "data.train_batch_size": JOINT,
    "data.micro_batch_size": JOINT,
    "data.micro_batch_size_per_gpu": JOINT,
    "data.max_prompt_length": to("max_prompt_length"),
    "data.max_response_length": to("response_length"),
    "data.max_length": to("max_length"),
    "data.prompt_key": JOINT,
    "data.response_key": JOINT,
    "data.prompt_dict_keys": JOINT,
    "data.response_dict_keys": JOINT,
    "model.partial_pretrain": to("model_name_or_path"),
    "model.lora_rank": JOINT,
    "model.lora_alpha": JOINT,
    "model.target_modules": JOINT,
    "model.trust_remote_code": to("trust_remote_code"),
    "model.enable_gradient_checkpointing": to("gradient_checkpointing"),
    "optim.lr": to("learning_rate"),
    "optim.betas": JOINT,
    "optim.weight_decay": to("weight_decay"),
    "optim.warmup_steps_ratio": to("warmup_steps"),
    "optim.clip_grad": to("max_grad_norm"),
    "optim.lr_scheduler": to("lr_scheduler_type"),
    "actor_rollout_ref.model.path": to("model_name_or_path"),
    "actor_rollout_ref.model.enable_gradient_checkpointing": to("gradient_checkpointing"),
    "actor_rollout_ref.actor.optim.lr": to("learning_rate"),
    "actor_rollout_ref.actor.optim.weight_decay": to("weight_decay"),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": to("warmup_steps"),
    "actor_rollout_ref.actor.ppo_mini_batch_size": JOINT,
    "actor_rollout_ref.actor.ppo_micro_batch_size": JOINT,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": JOINT,
    "actor_rollout_ref.actor.ppo_epochs": to("num_ppo_epochs"),
    "actor_rollout_ref.actor.clip_ratio": to("cliprange"),
    "actor_rollout_ref.actor.entropy_coeff": to("entropy_coef"),
    "actor_rollout_ref.actor.use_kl_loss": lost("the KL is in the reward, not in the loss", False),
    "actor_rollout_ref.actor.kl_loss*": lost("the KL is in the reward, not in the loss"),
    "actor_rollout_ref.rollout.temperature": to("temperature"),
    "actor_rollout_ref.rollout.top_p": lost("responses are sampled from the whole distribution", 1, 1.0),
    "actor_rollout_ref.rollout.top_k": lost("responses are sampled from the whole distribution", -1, 0),
    "actor_rollout_ref.rollout.n": lost("one response is sampled per prompt", 1),
    "actor_rollout_ref.rollout.name": to("rollout_engine", {"vllm": "vllm", "hf": None}),
    "actor_rollout_ref.rollout.gpu_memory_utilization": to("vllm_gpu_memory_utilization"),
    "critic.optim.lr": JOINT,
    "critic.optim.lr_warmup_steps_ratio": JOINT,
    "critic.model.path": JOINT,
    "critic.cliprange_value": to("cliprange_value"),
    "reward_model.enable": JOINT,
    "reward_model.model.path": to("reward_model_path"),
    "custom_reward_function.path": lost("name it in reward_functions as module:function"),
    "algorithm.adv_estimator": to("algorithm", {"gae": None, "grpo": "grpo", "rloo": "rloo"}),
    "algorithm.kl_ctrl.kl_coef": to("kl_coef"),
    "algorithm.gamma": to("gamma"),
    "algorithm.lam": to("lam"),
    "trainer.critic_warmup": to("critic_warmup_steps"),
    "trainer.default_local_dir": JOINT,
    "trainer.experiment_name": JOINT,
    "trainer.total_epochs": JOINT,
    "trainer.total_training_steps": to("max_steps"),
    "trainer.save_freq": to("save_steps", lambda value: value if value > 0 else None),
    "trainer.seed": to("seed"),
    "reward_model.model.input_tokenizer": lost("a reward model has the policy's tokenizer"),
    **dict.fromkeys(
        (
            *("data.val_batch_size", "data.return_raw_chat", "data.filter_overlong*", "data.truncation"),
            *(
                "data.balance_dp_token",
                "data.reward_fn_key",
                "data.shuffle",
                "model.fsdp_config.*",
                "model.external_lib",
            ),
            *("model.use_liger", "ulysses_sequence_parallel_size", "use_remove_padding", "custom_reward_function.name"),
            *("actor_rollout_ref.model.use_r*", "actor_rollout_ref.model.fsdp_config.*", "actor_rollout_ref.hybrid*"),
            *("actor_rollout_ref.actor.fsdp_config.*", "actor_rollout_ref.actor.use_dynamic_bsz"),
            *("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", "actor_rollout_ref.actor.ulysses*"),
            *("actor_rollout_ref.rollout.log_prob_*", "actor_rollout_ref.rollout.tensor_model_parallel_size"),
            *("actor_rollout_ref.rollout.max_num_*", "actor_rollout_ref.rollout.enforce_eager"),
            *("actor_rollout_ref.rollout.free_cache_engine", "actor_rollout_ref.rollout.val_kwargs.*"),
            *("actor_rollout_ref.rollout.load_format", "actor_rollout_ref.rollout.dtype"),
            *("actor_rollout_ref.ref.fsdp_config.*", "actor_rollout_ref.ref.log_prob_*"),
            *("critic.model.use_r*", "critic.model.enable_gradient_checkpointing", "critic.model.fsdp_config.*"),
            *("critic.ppo_micro_batch_size*", "critic.forward_*", "critic.ppo_max_token_len_per_gpu"),
            *("reward_model.model.use_r*", "reward_model.model.fsdp_config.*", "reward_model.micro_batch_size*"),
            *("trainer.logger", "trainer.project_name", "trainer.n_gpus_per_node", "trainer.nnodes"),
            *("trainer.test_freq", "trainer.val_*", "trainer.default_hdfs_dir", "trainer.resume*"),
            *("trainer.max_ckpt_to_keep", "trainer.log_val_generations", "trainer.balance_batch"),
        ),
        IDLE,
    ),
}


def _complete(values: Mapping[str, Any], result: Translation) -> None:
    if result.stage == "ppo":
        _ppo(values, result)
    else:
        size = number(values, "data.train_batch_size", 256)
        micro = number(values, "data.micro_batch_size_per_gpu", number(values, "data.micro_batch_size", 4))
        result.put("per_device_train_batch_size", micro, "data.micro_batch_size_per_gpu")
        result.put("gradient_accumulation_steps", max(1, size // micro), "data.train_batch_size")
        result.put("num_train_epochs", float(values.get("trainer.total_epochs", 4)), "trainer.total_epochs")
        betas = listed(values.get("optim.betas") or [0.9, 0.95])
        result.put("adam_beta1", float(betas[0]), "optim.betas")
        result.put("adam_beta2", float(betas[1]), "optim.betas")
        if number(values, "model.lora_rank", 0):
            result.put("use_peft", True, "model.lora_rank")
            result.put("lora_r", values["model.lora_rank"], "model.lora_rank")
            result.put("lora_alpha", values.get("model.lora_alpha", 16), "model.lora_alpha")
            result.put("lora_target_modules", values.get("model.target_modules", "all-linear"), "model.target_modules")
        _columns(values, result)
    files = listed(values.get("data.train_files") or [])
    if files:
        result.put("datasets", [whole_split(path) for path in files], "data.train_files")
    result.put("text_as_chat", True, "")
    result.put("bf16", True, "")
    folder = values.get("trainer.default_local_dir")
    result.name(folder, "trainer.default_local_dir")
    if "output_name" not in result.config and (name := name_of(str(values.get("trainer.experiment_name", "")))):
        result.put("output_name", name, "trainer.experiment_name")


def _columns(values: Mapping[str, Any], result: Translation) -> None:
    columns = {}
    for ours, key in (("prompt", "prompt"), ("completion", "response")):
        inner = listed(values.get(f"data.{key}_dict_keys") or [])
        name = values.get(f"data.{key}_key")
        if inner:
            result.lose(f"data.{key}_dict_keys", inner, f"the column {name} holds mappings; a column of text is needed")
        if name not in (None, ours):
            columns[ours] = name
    if columns:
        result.put("column_mapping", columns, "data.prompt_key")


def _ppo(values: Mapping[str, Any], result: Translation) -> None:
    rollout = number(values, "data.train_batch_size", 1024)
    step = number(values, "actor_rollout_ref.actor.ppo_mini_batch_size", 256)
    actor = "actor_rollout_ref.actor.ppo_micro_batch_size"
    micro = number(values, f"{actor}_per_gpu", number(values, actor, step))
    result.put("rollout_batch_size", rollout, "data.train_batch_size")
    result.put("num_mini_batches", max(1, rollout // step), "actor_rollout_ref.actor.ppo_mini_batch_size")
    result.put("per_device_train_batch_size", micro, actor)
    for key, other in (("critic.optim.lr", "learning_rate"), ("critic.optim.lr_warmup_steps_ratio", "warmup_steps")):
        if values.get(key) not in (None, result.config.get(other)):
            result.lose(key, values[key], "actor and critic have one learning rate and one schedule")
    if values.get("critic.model.path") not in (None, values.get("reward_model.model.path")):
        result.put("value_init", "sft", "critic.model.path")
    if not values.get("reward_model.enable"):
        result.lose("reward_model.enable", False, "rewards come from a function of verl: set reward_functions")
    if "trainer.total_training_steps" not in values:
        epochs = values.get("trainer.total_epochs", 30)
        result.lose(
            "trainer.total_epochs", epochs, "set total_episodes: the number of prompts times the number of passes"
        )


_PPO = {"num_ppo_epochs": 1, "kl_coef": 0.001, "lam": 1.0, "gamma": 1.0, "vf_coef": 1.0, "adam_epsilon": 1e-8}
TOOL = Tool(
    NAME,
    ("data.train_files", "actor_rollout_ref.model.path", "trainer.total_epochs", "model.partial_pretrain"),
    ENTRIES,
    _stage_of,
    _complete,
    {
        "sft": {
            "learning_rate": 1e-5,
            "weight_decay": 0.01,
            "warmup_steps": 0.1,
            "lr_scheduler_type": "cosine",
            "max_length": 1024,
            "seed": 1,
        },
        "ppo": {**_PPO, "weight_decay": 0.01, "lr_scheduler_type": "constant_with_warmup", "cliprange_value": 0.5},
    },
)
