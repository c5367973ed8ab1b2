"""The peer's side of bench.py: one timed run of a TRL trainer.

    python scripts/bench_peer.py STAGE WORK.json [--bf16]

Runs in TRL's environment and imports nothing of this project except its bench scripts. The trainers are TRL's own; they
get texts and prepare them themselves (PPO's gets token ids). Differences from their defaults: no gradient checkpointing
(on by default, costs time); no logging, saving, reporting or evaluation; fp32 unless --bf16; the order of the examples
is that of the other side.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench_probe import LORA_TARGETS, Stopwatch, run_side

CRITIC_FREE = ("rloo", "grpo")
STAGES = ("sft", "reward", "dpo", "kto", "simpo", "orpo", "ppo", *CRITIC_FREE)


def read_rows(path: str, order: list[int]) -> list[dict[str, Any]]:
    """The rows of a JSONL file in training order."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [rows[index] for index in order]


def sequences(row: dict[str, Any]) -> list[list[int]]:
    """The token ids of a row as a trainer collates it: the prompt with each completion, or only the prompt."""
    if "input_ids" in row:
        return [list(row["input_ids"])]
    if "chosen_input_ids" in row:
        return [list(row[name]) for name in ("chosen_input_ids", "rejected_input_ids")]
    prompt = list(row.get("prompt_ids", ()))
    if "completion_ids" in row:
        return [prompt + list(row["completion_ids"])]
    return [prompt + list(row[name]) for name in ("chosen_ids", "rejected_ids")]


def common_arguments(work: dict[str, Any], directory: str, bf16: bool) -> dict[str, Any]:
    """The common arguments of all trainers' configs."""
    return {
        "output_dir": directory,
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "seed": work["seed"],
        "bf16": bf16,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_timing(watch: Stopwatch) -> Any:
    """A callback that notifies the stopwatch of the start of training and the end of each step."""
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.ready(kwargs.get("optimizer"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.tick()

    return Timing()


def noted(collate: Any, watch: Stopwatch) -> Any:
    """A collator that records the examples of each step."""

    def collated(rows: list[dict[str, Any]]) -> Any:
        watch.saw([sequences(row) for row in rows])
        return collate(rows)

    return collated


def adapter(work: dict[str, Any], task: str) -> Any:
    """The config of the adapters, None if all weights are trained; `task` is peft's word."""
    rank = work["sizes"]["lora"]
    if not rank:
        return None
    from peft import LoraConfig

    targets = list(LORA_TARGETS)
    return LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)


def train_pairs(stage: str, work: dict[str, Any], watch: Stopwatch, directory: str, bf16: bool) -> None:
    """SFT, a reward model, or a loss on preferences with TRL's trainer."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    arguments = common_arguments(work, directory, bf16) | {
        "per_device_train_batch_size": work["sizes"]["batch"],
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "max_length": work["sizes"]["max_length"],
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    rows = read_rows(work["labels" if stage == "kto" else "pairs"], work["order"])
    if stage == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    options: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows),
        "processing_class": AutoTokenizer.from_pretrained(work["policy"]),
        "callbacks": [make_timing(watch)],
    }
    options["peft_config"] = adapter(work, "SEQ_CLS" if stage == "reward" else "CAUSAL_LM")
    if stage == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(work["reward"], dtype=torch.float32)
        trainer = trl.RewardTrainer(model=model, args=trl.RewardConfig(**arguments), **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(work["policy"], dtype=torch.float32)
        if stage == "sft":
            args = trl.SFTConfig(**arguments, completion_only_loss=True, packing=False)
            trainer = trl.SFTTrainer(model=model, args=args, **options)
        elif stage in ("simpo", "orpo"):  # no reference
            trainer = without_reference(stage, arguments)(model=model, **options)
        elif stage == "kto":
            args = trl.KTOConfig(**arguments, beta=0.1, loss_type="kto", precompute_ref_log_probs=False)
            options["ref_model"] = AutoModelForCausalLM.from_pretrained(work["policy"], dtype=torch.float32)
            trainer = trl.KTOTrainer(model=model, args=args, **options)
        else:
            args = trl.DPOConfig(**arguments, beta=0.1, loss_type=["sigmoid"], precompute_ref_log_probs=False)
            if options["peft_config"] is None:  # else the reference is the model without its adapter
                options["ref_model"] = AutoModelForCausalLM.from_pretrained(work["policy"], dtype=torch.float32)
            trainer = trl.DPOTrainer(model=model, args=args, **options)
    trainer.data_collator = noted(trainer.data_collator, watch)
    found = trainer.train()
    watch.losses.append(found.training_loss)


def without_reference(stage: str, arguments: dict[str, Any]) -> Any:
    """SimPO's or ORPO's trainer with its config; SimPO is a loss of TRL's CPO."""
    if stage == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        args: Any = CPOConfig(**arguments, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
        return partial(CPOTrainer, args=args)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return partial(ORPOTrainer, args=ORPOConfig(**arguments, beta=1.0))


def train_critic_free(stage: str, work: dict[str, Any], watch: Stopwatch, directory: str, bf16: bool) -> None:
    """RLOO or GRPO: rollouts of as many responses as PPO's, `group` to each prompt, and as many optimizer steps."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    sizes = work["sizes"]
    minibatch, group = sizes["rollout"] // sizes["minibatches"], sizes["group"]
    per_update = sizes["ppo_epochs"] * sizes["minibatches"]

    class Updates(TrainerCallback):
        """Tells the stopwatch of every update: a rollout with all its optimizer steps."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.ready(kwargs.get("optimizer"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % per_update == 0:
                watch.tick()

    updates = sizes["warmup_updates"] + sizes["episodes"] // sizes["rollout"]
    rows = read_rows(work["prompts"], work["prompt_order"])[: updates * sizes["rollout"] // group]
    make = {"rloo": (trl.RLOOConfig, trl.RLOOTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer)}[stage]
    arguments = make[0](
        **common_arguments(work, directory, bf16),
        per_device_train_batch_size=minibatch,
        gradient_accumulation_steps=1,
        steps_per_generation=sizes["minibatches"],
        num_iterations=sizes["ppo_epochs"],
        num_generations=group,
        max_completion_length=sizes["new_tokens"],
        max_steps=updates * per_update,
        shuffle_dataset=False,
        temperature=1.0,
        beta=0.05,
        logging_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(work["policy"], padding_side="left")
    trainer = make[1](
        args=arguments,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(work["policy"], dtype=torch.float32),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(work["reward"], dtype=torch.float32),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Updates()],
    )
    generate = trainer._generate_and_score_completions

    def noted_rollout(inputs: list[dict[str, Any]]) -> Any:
        watch.saw([[list(row["prompt_ids"])] for row in inputs[::group]])
        return generate(inputs)

    trainer._generate_and_score_completions = noted_rollout
    trainer.train()


def train_ppo(work: dict[str, Any], watch: Stopwatch, directory: str, bf16: bool) -> None:
    """PPO with the trainer of TRL 1.12."""
    if bf16:  # the only place from which this trainer's Accelerator reads its precision
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    sizes = work["sizes"]
    tokenizer = AutoTokenizer.from_pretrained(work["policy"], padding_side="left")
    rows = [{"input_ids": row["prompt_ids"]} for row in read_rows(work["prompts"], work["prompt_order"])]
    arguments = PPOConfig(
        **common_arguments(work, directory, bf16),
        # Its optimizer steps every `gradient_accumulation_steps` micro-batches, regardless of the minibatch. With 1 and
        # a micro-batch that is larger than a minibatch, it steps once per minibatch, as intended.
        per_device_train_batch_size=sizes["rollout"],
        gradient_accumulation_steps=1,
        num_mini_batches=sizes["minibatches"],
        num_ppo_epochs=sizes["ppo_epochs"],
        total_episodes=len(rows),
        local_rollout_forward_batch_size=sizes["rollout"],
        response_length=sizes["new_tokens"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        num_sample_generations=0,
    )
    causal, classifier = AutoModelForCausalLM, AutoModelForSequenceClassification
    critic = classifier.from_pretrained(work["reward"], dtype=torch.float32)
    with_adapters = adapter(work, "CAUSAL_LM")
    if with_adapters is not None:  # the trainer puts adapters into the policy only, and takes no wrapped critic
        from peft import inject_adapter_in_model

        inject_adapter_in_model(adapter(work, "SEQ_CLS"), critic)
        critic.score.requires_grad_(True)
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=causal.from_pretrained(work["policy"], dtype=torch.float32),
        # With adapters the reference is the policy without its own.
        ref_model=None if with_adapters else causal.from_pretrained(work["policy"], dtype=torch.float32),
        peft_config=with_adapters,
        reward_model=classifier.from_pretrained(work["reward"], dtype=torch.float32),
        value_model=critic,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[make_timing(watch)],
    )
    trainer.remove_callback(PrinterCallback)
    # Its own loader shuffles; this one returns the same batches in the order of the other side.
    loader = DataLoader(
        trainer.train_dataset,
        batch_size=sizes["rollout"],
        shuffle=False,
        collate_fn=noted(trainer.data_collator, watch),
        drop_last=True,
    )
    trainer.dataloader = trainer.accelerator.prepare(loader)
    trainer.train()


def measure(stage: str, work: dict[str, Any], bf16: bool = False) -> Stopwatch:
    """Run a trainer and time its steps."""
    import torch

    torch.set_num_threads(work["threads"])
    sizes, ppo = work["sizes"], stage == "ppo" or stage in CRITIC_FREE
    watch = Stopwatch(
        warmup=sizes["warmup_updates" if ppo else "warmup"], examples=sizes["rollout" if ppo else "batch"]
    )
    with tempfile.TemporaryDirectory() as directory:
        if stage in CRITIC_FREE:
            train_critic_free(stage, work, watch, directory, bf16)
        elif ppo:
            train_ppo(work, watch, directory, bf16)
        else:
            train_pairs(stage, work, watch, directory, bf16)
    return watch


if __name__ == "__main__":
    sys.exit(run_side("peer", STAGES, measure))
