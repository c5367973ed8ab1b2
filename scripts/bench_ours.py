"""This package's side of bench.py: one timed run of a stage.

    python scripts/bench_ours.py STAGE WORK.json [--bf16]

Runs the stage's own code from a config, as `rlhf` does, in a separate home. The stopwatch observes the windows that go
into the loop and the ends of its updates.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from bench_probe import LORA_TARGETS, Stopwatch, run_side

PREFERENCE = {
    "dpo": {},
    "kto": {"loss_type": "kto"},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "orpo": {"loss_type": "orpo", "beta": 1.0},
}
LOSSES = {"sft": "loss/nll", "reward": "loss/bradley_terry", **dict.fromkeys(PREFERENCE, "loss/dpo")}
LOSSES["orpo"] = ""  # TRL's has the SFT loss over prompt and response in it
CRITIC_FREE = ("rloo", "grpo")
SAMPLING = ("ppo", "ppo_shared", *CRITIC_FREE)
STAGES = (*LOSSES, *SAMPLING)


def config_of(stage: str, work: dict[str, Any], bf16: bool) -> tuple[str, Any]:
    """The command of a stage and its config."""
    from rlhf_pipeline.config.load import load_config

    sizes = work["sizes"]
    values: dict[str, Any] = {
        "model_name_or_path": work["policy"],
        "dataset_name": work["pairs"],
        "split_fractions": {"train": 1.0},  # nothing is held out, so nothing is evaluated
        "max_prompt_length": sizes["max_length"],
        "response_length": sizes["max_length"],  # prompt and response together were chosen to fit
        "per_device_train_batch_size": sizes["batch"],
        "learning_rate": work["learning_rate"],
        "logging_steps": 1_000_000,
        "seed": work["seed"],
        "bf16": bf16,
        "use_cpu": True,
        "num_threads": work["threads"],
        "output_name": stage,
    }
    if sizes["lora"]:
        values |= {"use_peft": True, "lora_r": sizes["lora"], "lora_alpha": 2 * sizes["lora"], "lora_dropout": 0.0}
        values["lora_target_modules"] = list(LORA_TARGETS)
    if stage == "reward":
        values["reward_centering"] = "none"
    if stage in PREFERENCE:
        values |= {"precompute_ref_log_probs": False, "beta": 0.1} if stage in ("dpo", "kto") else {}
        values |= PREFERENCE[stage]
    if stage == "kto":
        values["dataset_name"] = work["labels"]
    if stage in CRITIC_FREE:
        values |= {"algorithm": stage, "num_generations": sizes["group"]}
    if stage in SAMPLING:
        values |= {
            "dataset_name": work["prompts"],
            "reward_model_path": work["reward"],
            "max_prompt_length": sizes["prompt_length"],
            "response_length": sizes["new_tokens"],
            "total_episodes": sizes["episodes"] + sizes["warmup_updates"] * sizes["rollout"],
            "rollout_batch_size": sizes["rollout"],
            "num_ppo_epochs": sizes["ppo_epochs"],
            "num_mini_batches": sizes["minibatches"],
            "per_device_train_batch_size": sizes["rollout"] // sizes["minibatches"],
        }
        if stage not in CRITIC_FREE:
            values["value_init"] = "shared" if stage == "ppo_shared" else "reward_model"
    command = "ppo" if stage in SAMPLING else "dpo" if stage in PREFERENCE else {"reward": "train-rm"}.get(stage, stage)
    return command, load_config(command, None, extra=values).config


def sequences(example: Any) -> list[list[int]]:
    """The token ids of an example: the prompt with each completion, or only the prompt."""
    return [example.prompt_ids + ids for ids in example.completions] or [example.prompt_ids]


def measure(stage: str, work: dict[str, Any], bf16: bool = False) -> Stopwatch:
    """Run a stage and time its steps."""
    from rlhf_pipeline.experiment.run import stage_function
    from rlhf_pipeline.stages import common
    from rlhf_pipeline.training import ppo_rollouts, session

    sizes, ppo = work["sizes"], stage in SAMPLING
    examples: list[Any] = []
    watch = Stopwatch(
        warmup=sizes["warmup_updates" if ppo else "warmup"], examples=sizes["rollout" if ppo else "batch"]
    )
    fit, example_windows, sample = session.fit, common.example_windows, ppo_rollouts.sample_for_prompts

    def noted_windows(found: Any, **options: Any) -> Any:
        examples.extend(found)
        return example_windows(found, **options)

    def noted_prompts(policy: Any, prompts: Any, **options: Any) -> Any:
        watch.saw([sequences(prompt) for prompt in prompts])
        return sample(policy, prompts, **options)

    def watched(windows: Any) -> Any:
        for window in windows:
            if not ppo:
                watch.saw([sequences(examples[i]) for batch in window.micro_batches for i in batch.indices])
            yield window

    def timed_fit(model: Any, windows: Any, step: Any, *, on_update: Any, **options: Any) -> int:
        meter = step.keywords["meter"]

        def updated(number: int, metrics: dict[str, float], window: Any) -> None:
            on_update(number, metrics, window)
            watch.tick(meter.flops, metrics.get(LOSSES.get(stage, "")))

        watch.ready(options["optimizer"])
        return fit(model, watched(windows), step, on_update=updated, **options)

    command, config = config_of(stage, work, bf16)
    with (
        mock.patch.object(session, "fit", timed_fit),
        mock.patch.object(common, "example_windows", noted_windows),
        mock.patch.object(ppo_rollouts, "sample_for_prompts", noted_prompts),
        tempfile.TemporaryDirectory() as home,
    ):
        stage_function(command)(config, Path(home), resume=False, quiet=True)
    return watch


if __name__ == "__main__":
    sys.exit(run_side("ours", STAGES, measure))
