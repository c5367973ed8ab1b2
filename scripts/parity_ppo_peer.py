"""The peer's side of parity_ppo.py: runs TRL's own PPOTrainer.train() on fixed rollouts and saves its tensors.

    python parity_ppo_peer.py INPUTS.json WEIGHTS.safetensors OUT_DIRECTORY

Runs in the peer's environment and imports nothing of this project. The peer's arithmetic is unchanged. The only patch
is the draw of the next token (`torch.multinomial` inside the peer's generation), which then gives the fixed responses.
The trainer's results are read from its local variables when it calls `masked_whiten`, leaves `accelerator.accumulate`
and steps the optimizer.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PACKAGES = ("trl", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
ROLLOUT = ("logprobs", "ref_logprobs", "kl", "values", "scores", "sequence_lengths", "rewards", "returns")
MICRO_BATCH = ("pg_loss", "vf_loss", "pg_clipfrac", "vf_clipfrac", "approxkl", "entropy")


class Models:
    """The four models from one file of weights, created again for every run."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor], reward_as_critic: bool):
        def load(auto_class: Any, name: str, **extra: Any) -> torch.nn.Module:
            model = auto_class.from_config(AutoConfig.for_model(**config, **extra), dtype=torch.float32)
            state = {key.partition("/")[2]: value for key, value in weights.items() if key.startswith(f"{name}/")}
            model.load_state_dict(state)
            return model

        self.actor = load(AutoModelForCausalLM, "actor")
        self.reference = load(AutoModelForCausalLM, "reference")
        self.reward = load(AutoModelForSequenceClassification, "reward", num_labels=1)
        critic = "reward" if reward_as_critic else "critic"
        self.critic = load(AutoModelForSequenceClassification, critic, num_labels=1)


def tokenizer_of(vocab_size: int, pad_id: int, eos_id: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are its token ids."""
    words = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(pad_id)))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(pad_id), eos_token=str(eos_id), padding_side="left"
    )


@contextmanager
def forced_sampling(rollouts: list[dict[str, Any]], pad_id: int):
    """A context in which the peer's `generate` draws each prompt's fixed response, one token per step."""
    original_generate, original_draw = ppo_trainer.generate, torch.multinomial
    by_prompt = {tuple(row["prompt"]): row["response"] for row in rollouts}

    def generate(lm_backbone, queries, pad_token_id, generation_config):
        prompts = [tuple(token for token in query if token != pad_id) for query in queries.tolist()]
        responses = [by_prompt[prompt] for prompt in prompts]
        step = 0

        def draw(probabilities, num_samples):
            nonlocal step
            # After the end of a response the peer's sampler writes the pad token, whatever is drawn.
            chosen = [response[step] if step < len(response) else pad_id for response in responses]
            step += 1
            return torch.tensor(chosen)[:, None]

        torch.multinomial = draw
        try:
            return original_generate(lm_backbone, queries, pad_token_id, generation_config)
        finally:
            torch.multinomial = original_draw

    ppo_trainer.generate = generate
    try:
        yield
    finally:
        ppo_trainer.generate = original_generate


@contextmanager
def whitening_seen(record: dict[str, Any]):
    """A context in which every call of the peer's `masked_whiten` records its input and its caller's tensors."""
    original = ppo_trainer.masked_whiten

    def masked_whiten(values, mask, shift_mean=True):
        caller = sys._getframe(1).f_locals
        if shift_mean:  # the advantages; returns and token rewards are final here
            record.update({name: caller[name].clone() for name in ROLLOUT})
            record["advantages_before"] = values.clone()
        else:
            record["rewards_before"] = values.clone()
        return original(values, mask, shift_mean)

    ppo_trainer.masked_whiten = masked_whiten
    try:
        yield
    finally:
        ppo_trainer.masked_whiten = original


class Watch(TrainerCallback):
    """Reads the trainer's micro-batches and optimizer steps; counts the optimizer's own steps."""

    def __init__(self, trainer: PPOTrainer, models: Models):
        self.micro_batches: list[dict[str, Any]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.advantages: torch.Tensor | None = None
        self.metrics: dict[str, float] = {}
        accumulate, optimizer, log = trainer.accelerator.accumulate, trainer.optimizer.optimizer, trainer.log
        step = optimizer.step
        watch = self

        class Accumulate:
            def __init__(self, *models):
                self.inner = accumulate(*models)

            def __enter__(self):
                return self.inner.__enter__()

            def __exit__(self, *error):
                done = self.inner.__exit__(*error)
                caller = sys._getframe(1).f_locals
                seen = {name: caller[name].detach().clone() for name in MICRO_BATCH}
                watch.micro_batches.append({"rows": caller["micro_batch_inds"].tolist(), **seen})
                watch.advantages = caller["advantages"].clone()
                return done

        def counted(*args, **kwargs):
            named = [
                (f"{role}/{name}", parameter)
                for role in ("actor", "critic")
                for name, parameter in getattr(models, role).named_parameters()
            ]
            watch.weights.append({name: p.detach().clone() for name, p in named})
            watch.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
            return step(*args, **kwargs)

        def logged(metrics, *args, **kwargs):
            watch.metrics = {name: value for name, value in metrics.items() if "/" in name and isfinite(value)}
            return log(metrics, *args, **kwargs)

        trainer.accelerator.accumulate, optimizer.step, trainer.log = Accumulate, counted, logged


def run_case(inputs: dict[str, Any], weights: dict[str, torch.Tensor], case: dict[str, Any]) -> tuple[Watch, dict]:
    """One update of the peer's trainer."""
    rollouts, pad_id = inputs["rollouts"][case["rollouts"]], inputs["pad_id"]
    tokenizer = tokenizer_of(inputs["model"]["vocab_size"], pad_id, case["eos_id"])
    models = Models(inputs["model"], weights, case["critic"] == "reward")
    width = max(len(row["prompt"]) for row in rollouts)
    queries = [[pad_id] * (width - len(row["prompt"])) + row["prompt"] for row in rollouts]
    with tempfile.TemporaryDirectory() as directory:
        arguments = PPOConfig(
            output_dir=directory,
            response_length=inputs["response_length"],
            total_episodes=len(rollouts),
            seed=inputs["seed"],
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            local_rollout_forward_batch_size=3,  # does not divide 8: the peer's chunks differ in size
            **case["arguments"],
        )
        numpy.random.seed(inputs["seed"])
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=models.actor,
            ref_model=models.reference,
            reward_model=models.reward,
            value_model=models.critic,
            # The collator ignores its rows and returns the fixed prompts, left-padded, in their order. Accelerate
            # treats the last batch of a pass over the data set differently, so the number of rows matters.
            train_dataset=Dataset.from_list([{"input_ids": [0]}] * len(rollouts) * case["dataset_batches"]),
            data_collator=lambda rows: {"input_ids": torch.tensor(queries)},
        )
        watch, record = Watch(trainer, models), {}
        with forced_sampling(rollouts, pad_id), whitening_seen(record):
            trainer.train()
    return watch, record


def as_lists(value: Any) -> Any:
    """Tensors as nested lists of numbers, floats with 9 significant digits (which is exact for fp32)."""
    if isinstance(value, torch.Tensor):
        return as_lists(value.tolist())
    if isinstance(value, dict):
        return {name: as_lists(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_lists(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main(inputs_path: Path, weights_path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    inputs, weights = json.loads(inputs_path.read_text()), load_file(weights_path)
    tensors: dict[str, torch.Tensor] = {}
    cases, steps = {}, []
    for name, case in inputs["cases"].items():
        watch, record = run_case(inputs, weights, case)
        record["advantages"] = watch.advantages
        for number in range(case["keep_steps"]):
            tensors |= {f"{name}/{number}/grad/{key}": value for key, value in watch.gradients[number].items()}
            if number:  # before the first step they are the weights that both sides start from
                tensors |= {f"{name}/{number}/{key}": value for key, value in watch.weights[number].items()}
        cases[name] = {
            "rollout": {key: record[key] for key in case["keep"]},
            "micro_batches": watch.micro_batches if case["keep_steps"] else [],
            "metrics": watch.metrics,
            "optimizer_steps": len(watch.gradients),
        }
    for case in inputs["step_counts"]:
        watch, _ = run_case(inputs, weights, {**inputs["cases"]["defaults"], **case})
        steps.append({**case, "micro_batches": len(watch.micro_batches), "optimizer_steps": len(watch.gradients)})
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    versions["torch"] = torch.__version__
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "peer.safetensors")
    document = {"versions": versions, "cases": as_lists(cases), "step_counts": steps}
    (out / "peer.json").write_text(json.dumps(document))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
