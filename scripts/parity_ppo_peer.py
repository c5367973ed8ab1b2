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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PACKAGES = ("trl", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
ROLLOUT = ("logprobs", "ref_logprobs", "kl", "values", "scores", "sequence_lengths", "rewards", "returns")
MICRO_BATCH = ("pg_loss", "vf_loss", "pg_clipfrac", "vf_clipfrac", "approxkl", "entropy")


Models = dict[str, torch.nn.Module]


def load_models(config: dict[str, Any], weights: dict[str, torch.Tensor], critic: str) -> Models:
    """The four models by role, from one file of weights; `critic` names the weights that the critic starts from."""

    def load(auto_class: Any, name: str, **extra: Any) -> torch.nn.Module:
        model = auto_class.from_config(AutoConfig.for_model(**config, **extra), dtype=torch.float32)
        state = {key.partition("/")[2]: value for key, value in weights.items() if key.startswith(f"{name}/")}
        model.load_state_dict(state)
        return model

    models = {role: load(AutoModelForCausalLM, role) for role in ("actor", "reference")}
    names = {"reward": "reward", "critic": critic}
    return models | {role: load(AutoModelForSequenceClassification, name, num_labels=1) for role, name in names.items()}


def fixed_generation(rollouts: list[dict[str, Any]], pad_id: int) -> Callable:
    """The peer's `generate`, which draws each prompt's fixed response, one token per step."""
    original = ppo_trainer.generate
    by_prompt = {tuple(row["prompt"]): row["response"] for row in rollouts}

    def generate(lm_backbone, queries, pad_token_id, generation_config):
        prompts = [tuple(token for token in query if token != pad_id) for query in queries.tolist()]
        # After the end of a response the peer's sampler writes the pad token, whatever is drawn.
        columns = zip_longest(*(by_prompt[prompt] for prompt in prompts), fillvalue=pad_id)

        def draw(probabilities, num_samples):
            return torch.tensor(next(columns, [pad_id] * len(prompts)))[:, None]

        with mock.patch.object(torch, "multinomial", draw):
            return original(lm_backbone, queries, pad_token_id, generation_config)

    return generate


@contextmanager
def watched(trainer: PPOTrainer, models: Models) -> Iterator[SimpleNamespace]:
    """A context that records the trainer's tensors, micro-batches, last log, and the optimizer's own steps."""
    seen = SimpleNamespace(rollout={}, micro_batches=[], gradients=[], weights=[], metrics={})
    accumulate, optimizer, log = trainer.accelerator.accumulate, trainer.optimizer.optimizer, trainer.log
    step, whiten = optimizer.step, ppo_trainer.masked_whiten

    def masked_whiten(values, mask, shift_mean=True):
        caller = sys._getframe(1).f_locals
        if shift_mean:  # the advantages; returns and token rewards are final here
            seen.rollout |= {name: caller[name].clone() for name in ROLLOUT}
        seen.rollout["advantages_before" if shift_mean else "rewards_before"] = values.clone()
        return whiten(values, mask, shift_mean)

    @contextmanager
    def accumulated(*parts):
        with accumulate(*parts):
            yield
        caller = sys._getframe(2).f_locals  # of the `with` statement, whose exit resumes this generator
        figures = {name: caller[name].detach().clone() for name in MICRO_BATCH}
        seen.micro_batches.append({"rows": caller["micro_batch_inds"].tolist(), **figures})
        seen.rollout["advantages"] = caller["advantages"].clone()

    def counted(*args, **kwargs):
        named = {f"{role}/{name}": p for role in ("actor", "critic") for name, p in models[role].named_parameters()}
        seen.weights.append({name: p.detach().clone() for name, p in named.items()})
        seen.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        return step(*args, **kwargs)

    def logged(metrics, *args, **kwargs):
        seen.metrics = {name: value for name, value in metrics.items() if "/" in name and isfinite(value)}
        return log(metrics, *args, **kwargs)

    trainer.accelerator.accumulate, optimizer.step, trainer.log = accumulated, counted, logged
    with mock.patch.object(ppo_trainer, "masked_whiten", masked_whiten):
        yield seen


def run_case(inputs: dict[str, Any], weights: dict[str, torch.Tensor], case: dict[str, Any]) -> SimpleNamespace:
    """One update of the peer's trainer."""
    rollouts, pad_id = inputs["rollouts"][case["rollouts"]], inputs["pad_id"]
    words = Tokenizer(WordLevel({str(i): i for i in range(inputs["model"]["vocab_size"])}, unk_token=str(pad_id)))
    names = {"pad_token": str(pad_id), "eos_token": str(case["eos_id"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **names)
    models = load_models(inputs["model"], weights, case["critic"])
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
            model=models["actor"],
            ref_model=models["reference"],
            reward_model=models["reward"],
            value_model=models["critic"],
            # The collator ignores its rows and returns the fixed prompts, left-padded, in their order. Accelerate
            # treats the last batch of a pass over the data set differently, so the number of rows matters.
            train_dataset=Dataset.from_list([{"input_ids": [0]}] * len(rollouts) * case["dataset_batches"]),
            data_collator=lambda rows: {"input_ids": torch.tensor(queries)},
        )
        generate = fixed_generation(rollouts, pad_id)
        with mock.patch.object(ppo_trainer, "generate", generate), watched(trainer, models) as seen:
            trainer.train()
    return seen


def main(inputs_path: Path, weights_path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    inputs, weights = json.loads(inputs_path.read_text()), load_file(weights_path)
    tensors: dict[str, torch.Tensor] = {}
    cases, steps = {}, []
    for name, case in inputs["cases"].items():
        seen = run_case(inputs, weights, case)
        for number in range(case["keep_steps"]):
            tensors |= {f"{name}/{number}/grad/{key}": value for key, value in seen.gradients[number].items()}
            if number:  # before the first step they are the weights that both sides start from
                tensors |= {f"{name}/{number}/{key}": value for key, value in seen.weights[number].items()}
        cases[name] = {
            "rollout": {key: seen.rollout[key] for key in case["keep"]},
            "micro_batches": seen.micro_batches if case["keep_steps"] else [],
            "metrics": seen.metrics,
            "optimizer_steps": len(seen.gradients),
        }
    for case in inputs["step_counts"]:
        seen = run_case(inputs, weights, {**inputs["cases"]["defaults"], **case})
        steps.append({**case, "micro_batches": len(seen.micro_batches), "optimizer_steps": len(seen.gradients)})
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    versions["torch"] = torch.__version__
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "peer.safetensors")
    document = {"versions": versions, "cases": cases, "step_counts": steps}
    (out / "peer.json").write_text(json.dumps(document, default=torch.Tensor.tolist))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
