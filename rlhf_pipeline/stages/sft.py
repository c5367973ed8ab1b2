"""Supervised fine-tuning of a language model, or training from random weights (pretraining)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.language_model import negative_log_likelihood
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.examples import Example, all_whole
from rlhf_pipeline.data.shown import trained_text
from rlhf_pipeline.models.four_bits import entries
from rlhf_pipeline.models.loading import init_causal_lm, new_config
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.noise import require_no_noise
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.rollout.scoring import score
from rlhf_pipeline.stages.common import example_schedule, find_base, load_policy, onto, tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.stages.publish import inputs_of, publish
from rlhf_pipeline.stages.result import StageResult
from rlhf_pipeline.stages.selection import selection_of
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.open_run import open_run
from rlhf_pipeline.training.session import Plan, train
from rlhf_pipeline.training.trl_engine.train import train_with_trl
from rlhf_pipeline.training.windows import ExampleBatch, Loss


def sft_step(model: Policy, micro_batch: ExampleBatch, *, meter: CostMeter, shape: ModelShape) -> Loss:
    """Negative log-likelihood of the completion tokens, a sum in nats; its denominator is tokens."""
    batch = micro_batch.batch
    scores = model(batch)
    meter.train(shape, batch)
    meter.tokens_trained += batch.active_tokens
    loss = negative_log_likelihood(scores.logprobs) * micro_batch.weight
    entropy = scores.entropy.sum() * micro_batch.weight
    checked = {"log-probabilities of the policy": scores.logprobs}
    return Loss({"nll": (loss, "tokens", 1.0)}, {"entropy": (entropy, "tokens")}, checked)


def mean_nll(
    policy: Policy,
    examples: Sequence[Example],
    *,
    responses_at_once: int,
    memory: Memory | None = None,
    device: torch.device,
) -> dict[str, float]:
    """Mean negative log-likelihood per trained token and per completion, in nats, computed by `score`."""

    def logprobs(part: Sequence[Example]) -> Tensor:
        batch = pack(part, layout=policy.reader.layout).to(device)
        return batch.per_completion(policy(batch).logprobs.double())

    was_training = policy.training
    policy.eval()  # dropout is for training only
    try:
        total = -float(score(logprobs, examples, responses_at_once=responses_at_once, memory=memory).sum())
    finally:
        policy.train(was_training)
    tokens = sum(example.tokens_trained for example in examples)
    return {"eval_nll": total / tokens, "eval_nll_per_sequence": total / len(examples)}


def run_sft(config: SftConfig, home: Path, **options) -> StageResult:
    """Train on demonstrations (or plain text) and register the model."""
    if config.model_init is not None:
        new_config(config.model_init, dropout=config.dropout)  # check its keys before training a tokenizer
    with open_run("sft", config, home, **options) as run:
        config = run.config
        # 1. The model: an existing one, or a new one with its tokenizer.
        parents = {}
        if config.model_name_or_path is not None:
            parents["base"] = find_base(run, config)
        data = StageData(config, run.registry.home, run.log.say)
        if parents:
            tokenizer = tokenizer_of(parents["base"], config.trust_remote_code, config)
            policy = load_policy(parents["base"], config, tokenizer, run.loads_on, dropout=config.dropout)
        else:
            assert config.model_init is not None and config.tokenizer_init is not None  # `check_start` of the config
            tokenizer = data.new_tokenizer(config.tokenizer_init)
            model = init_causal_lm(
                config.model_init,
                tokenizer,
                seed=config.seed,
                dtype=config.dtype,
                attn_implementation=config.attn_implementation,
                dropout=config.dropout,
            )
            model = onto(run.loads_on, model)
            if not config.dropout:
                require_no_noise(model)
            policy = Policy(model, inspect_model(model)).train()
        run.placed(policy)
        run.log.say(f"model: {sum(map(entries, policy.parameters())):,} parameters, {policy.reader}")

        # 2. The data.
        examples, reports = data.training(tokenizer)
        held_out, _ = data.held_out("demonstration", tokenizer)
        if config.trains_all:
            examples, held_out = all_whole(examples), all_whole(held_out)
        run.log.say(f"first example: {trained_text(examples[0], tokenizer)}")

        chosen_by = selection_of(run, policy, data, parents.get("base"), tokenizer) if config.select_by else None
        if chosen_by is not None and chosen_by.resolved is not None:
            parents["selector"] = chosen_by.resolved

        # 3. Train.
        shape = ModelShape.of(policy.model, checkpointed=config.gradient_checkpointing)
        windows, total = example_schedule(run, examples, layout=policy.reader.layout)

        def evaluate() -> dict[str, float]:
            loss = mean_nll(
                policy,
                held_out,
                responses_at_once=config.per_device_eval_batch_size,
                memory=run.memory,
                device=run.device,
            )
            return loss if chosen_by is None else loss | chosen_by.measure()

        plan = Plan(
            windows,
            functools.partial(sft_step, meter=run.meter, shape=shape),
            total,
            shown=("loss/nll", "entropy", "learning_rate"),
            model=policy.model,
            tokenizer=tokenizer,
            inputs=inputs_of(parents, reports),
            evaluate=evaluate if held_out else None,
        )
        if config.engine == "trl":
            last = train_with_trl(run, plan, examples=examples, shape=shape)
        else:
            last = train(run, policy, plan)

        # 4. Evaluate and register.
        metrics = {
            "train": last,
            "health": plan.health,
            **(evaluate() if held_out else {}),
            "train_examples": len(examples),
            "eval_examples": len(held_out),
        }
        return publish(run, plan, parents=parents, reports=reports, metrics=metrics)
