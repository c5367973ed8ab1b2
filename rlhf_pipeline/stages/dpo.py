"""Direct preference optimisation, with reference log-probabilities computed once and cached."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import PreferenceLoss, correct, dpo_sigmoid_loss
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.preferences import preference_metrics
from rlhf_pipeline.models.loading import save_model
from rlhf_pipeline.models.roles import Policy, TokenScores, assert_independent
from rlhf_pipeline.stages.common import (
    StageResult,
    example_schedule,
    find_model,
    inputs_of,
    load_policy,
    publish,
    require_same_tokenizer,
    tokenizer_of,
    with_lengths,
)
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.pairs import count_pairs, split_pairs
from rlhf_pipeline.training.reference_cache import cached_logprobs, completion_logprob_sums
from rlhf_pipeline.training.run import open_run
from rlhf_pipeline.training.session import Plan, train
from rlhf_pipeline.training.windows import ExampleBatch, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dpo_step(
    model: Policy,
    micro_batch: ExampleBatch,
    *,
    beta: float,
    reference: Tensor | Callable[[PackedBatch], TokenScores],
    meter: CostMeter,
    shape: ModelShape,
) -> Loss:
    """DPO loss of a micro-batch; denominator: pairs.

    Args:
        reference: (examples, 2) log-probabilities of all pairs, or what scores a batch under the frozen reference.
    """
    batch, weight = micro_batch.batch, micro_batch.weight
    scores = model(batch)
    meter.train(shape, batch)
    meter.tokens_trained += batch.active_tokens
    chosen, rejected = split_pairs(batch.per_completion(scores.logprobs))
    if isinstance(reference, Tensor):
        ref_chosen, ref_rejected = reference[micro_batch.indices].to(chosen.device).unbind(1)
    else:
        with torch.no_grad():
            ref_chosen, ref_rejected = split_pairs(batch.per_completion(reference(batch).logprobs))
        meter.score(shape, batch)
    result: PreferenceLoss = dpo_sigmoid_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    margins = result.chosen_rewards - result.rejected_rewards
    pairs = {
        "rewards/chosen": result.chosen_rewards.sum(),
        "rewards/rejected": result.rejected_rewards.sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": correct(result.chosen_rewards, result.rejected_rewards).sum(),
        "logps/chosen": chosen.detach().sum(),
        "logps/rejected": rejected.detach().sum(),
        "logps/chosen_minus_reference": (chosen.detach() - ref_chosen).sum(),
    }
    metrics = {name: (value * weight, "pairs") for name, value in pairs.items()}
    metrics["entropy"] = (scores.entropy.sum() * weight, "tokens")
    return Loss({"dpo": (result.loss * weight, "pairs", 1.0)}, metrics)


def implicit_reward_metrics(
    policy: Policy,
    reference: Tensor,
    examples: Sequence[Example],
    *,
    beta: float,
    batch_size: int,
    pad_id: int,
    device: torch.device,
) -> dict[str, float]:
    """How well the implicit reward beta log(pi / pi_ref) orders held-out pairs, and the DPO loss on them."""
    logprobs = completion_logprob_sums(policy, examples, batch_size=batch_size, pad_id=pad_id, device=device)
    rewards = beta * (logprobs - reference)
    metrics = preference_metrics((rewards[:, 0] - rewards[:, 1]).tolist(), [e.prompt_key for e in examples])
    return {f"eval_{name}": value for name, value in metrics.items()}


def run_dpo(config: Any, home: Path, **options) -> StageResult:
    """Train a policy on preference pairs with DPO and register it."""
    with open_run("dpo", config, home, **options) as run:
        # 1. Policy and frozen reference: two loads of files, never two views of one model.
        parent = find_model(
            run.registry, config.model_name_or_path, "policy", revision=config.model_revision, say=run.log.say
        )
        ref_parent = find_model(run.registry, config.ref_model, "policy") if config.ref_model else parent
        config = run.settle(with_lengths(config, parent, run.log.say))
        tokenizer: PreTrainedTokenizerBase = tokenizer_of(parent, config.trust_remote_code)
        if config.ref_model:
            require_same_tokenizer(parent, ref_parent, tokenizer, config.trust_remote_code)
        policy = load_policy(parent, config, tokenizer, run.device)
        frozen = load_policy(ref_parent, config, tokenizer, run.device, frozen=True)
        assert_independent(policy, frozen)

        # 2. The pairs, and what the reference thinks of them.
        data = StageData(config, run.registry.home, run.log.say)
        examples, reports = data.split("pair", config.dataset_train_split, tokenizer, limit=config.max_train_samples)
        held_out, _ = data.split("pair", config.dataset_test_split, tokenizer, required=False)
        eval_options = {
            "batch_size": config.per_device_eval_batch_size,
            "pad_id": tokenizer.pad_token_id,
            "device": run.device,
        }
        cache = run.registry.home / "cache"
        key = {"model": ref_parent.digest, "dtype": config.dtype, "bf16": config.bf16}

        def score_reference(batch: PackedBatch) -> TokenScores:
            with run.accelerator.autocast():  # in the precision that the policy is trained in
                return frozen(batch)

        with run.meter.part("reference"), run.accelerator.autocast():
            held_out_reference = cached_logprobs(frozen, held_out, cache, key, **eval_options).logprobs
            reference: Tensor | Callable[[PackedBatch], TokenScores] = score_reference
            if config.precompute_ref_log_probs:
                found = cached_logprobs(frozen, examples, cache, key, **eval_options)
                reference = found.logprobs
                run.log.say(f"reference log-probabilities: {'from the cache' if found.hit else 'computed and cached'}")
                # On the bill whether or not an earlier run has paid it: the cost of an arm must not depend on luck.
                shape = ModelShape.of(frozen.model)
                run.meter.flops += found.flops(shape, examples) if run.checkpoint is None else 0.0

        # 3. Train.
        parents = {"base": parent, "reference": ref_parent}
        shape = ModelShape.of(policy.model)
        windows, total = example_schedule(
            run, examples, layout=policy.reader.layout, pad_id=tokenizer.pad_token_id, count=count_pairs
        )

        def evaluate() -> dict[str, float]:
            if not held_out:
                return {}
            return implicit_reward_metrics(policy, held_out_reference, held_out, beta=config.beta, **eval_options)

        plan = Plan(
            windows,
            functools.partial(dpo_step, beta=config.beta, reference=reference, meter=run.meter, shape=shape),
            total,
            shown=("loss/dpo", "rewards/accuracies", "rewards/margins", "logps/chosen", "learning_rate"),
            inputs=inputs_of(parents, reports),
            evaluate=evaluate,
            save=lambda directory: save_model(policy.model, tokenizer, directory),
        )
        last = train(run, policy, plan)
        fall = last.get("logps/chosen_minus_reference", 0.0)
        if fall < -1e-4:
            run.log.say(
                f"the chosen responses' log-probability fell by {-fall:.3g} nats against the reference: DPO raises the "
                "margin, not the chosen response itself (no fault by itself)"
            )

        # 4. Evaluate and register.
        metrics = {"train": last, **evaluate(), "train_pairs": len(examples)}
        return publish(run, policy.model, tokenizer, parents=parents, reports=reports, metrics=metrics)
