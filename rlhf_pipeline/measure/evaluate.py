"""Evaluate one model: a policy by its samples, a reward model by held-out pairs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_pipeline.config.compare import EvaluateConfig, require_in_context
from rlhf_pipeline.config.in_context import split_arm
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.data.examples import made_once
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.evaluation.sampled import Samples, add_kl, draw, take_from_policy
from rlhf_pipeline.measure.bench import Bench, add_rewards, find_policies, scored_as_trained, set_up
from rlhf_pipeline.measure.best_of import best_of_n_rows
from rlhf_pipeline.measure.contexts import known_as
from rlhf_pipeline.measure.icdpo import pair_accuracy, pairs_of_source
from rlhf_pipeline.measure.in_context import measure_in_context
from rlhf_pipeline.measure.kept import identity_of, keep
from rlhf_pipeline.measure.trained_on import changes_of, owned_by
from rlhf_pipeline.models.memory import MEASURING_ADVICE, Memory
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.sharing import sharing_models
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.parents import reference_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import role_of
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.stages.common import find_model, load_reward_model, tokenizer_of
from rlhf_pipeline.stages.data import StageData, preference_kind
from rlhf_pipeline.stages.reward_quality import baselines, describe_pairs, score_examples
from rlhf_pipeline.training.accelerator import make_accelerator
from rlhf_pipeline.training.tracking import console


def measure(bench: Bench, policy: Policy, scorer: RewardSource | None = None) -> Samples:
    """Sample a policy by the bench's plan and add every known figure; `scorer` replaces the bench's.

    With a decoder, the figures `OF_POLICY` are left out: they belong to samples of the policy (`without_decoder`).
    """
    samples = draw(policy, bench.plan)
    add_rewards(bench, samples, scorer)
    if bench.plan.decoding.is_plain:
        _add_kl(bench, samples, policy)
    return samples


def without_decoder(bench: Bench) -> Bench:
    """The same bench with samples of the policies themselves, at the temperature."""
    return replace(bench, plan=replace(bench.plan, decoding=bench.plan.decoding.plain))


def _add_kl(bench: Bench, samples: Samples, policy: Policy) -> None:
    reference = bench.reference_policy()
    if reference is not None:
        add_kl(samples, policy, reference, bench.plan)


def measured(bench: Bench, resolved: Resolved, scorer: RewardSource | None = None) -> Samples:
    """`measure` of a model, or of an arm that answers with demonstrations in its context."""
    if resolved.method is not None:
        return measure_in_context(bench, resolved, scorer)
    return measure(bench, bench.policy(resolved), scorer)


def kept_samples(bench: Bench, resolved: Resolved, scorer: RewardSource | None = None, *, wait: bool = True) -> Samples:
    """`measured` of a model or an arm, from the cache if it is there.

    Raises:
        Busy: see `keep`.
    """

    def make() -> dict[str, Any]:
        made = measured(bench, resolved, scorer)
        return {
            "completions": [example.completions for example in made.examples],
            "ended": [example.ended for example in made.examples],
            "values": {name: values.tolist() for name, values in made.values.items()},
            "facts": made.facts,
        }

    reference, scores = bench.reference, {"score": scorer or bench.scorer, "judge": bench.judge, "truth": bench.truth}
    models = {name: identity_of(bench, None if one is None else one.label) for name, one in scores.items()}
    models |= {"policy": resolved.identity, "reference": "none" if reference is None else reference.identity}
    plan = bench.plan
    more = {"samples": plan.samples, "seed": plan.seed, "decoding": plan.decoding.model_dump()}
    own = {} if resolved.method is None else {"in_context": known_as(bench, resolved)}
    found: Any = keep(bench, "samples", models, make, wait=wait, **more, **own)
    responses = zip(plan.prompts, found["completions"], found["ended"], strict=True)
    examples = [replace(prompt, completions=ids, ended=ended) for prompt, ids, ended in responses]
    clusters = [example.prompt_key for example in examples for _ in example.completions]
    values = {name: np.array(values) for name, values in found["values"].items()}
    return Samples(examples, clusters, values, plan.decoding.do_sample, found["facts"])


@sharing_models()
def run_evaluate(reference_text: str, config: EvaluateConfig, home: Path) -> dict[str, Any]:
    """Return the figures of one model by name; intervals and rows have the form of results.json."""
    say = partial(console.print, markup=False)
    registry = Registry(home)
    require_in_context(config, reference_text)
    device = make_accelerator(config).device
    method, text = split_arm(reference_text)
    resolved = registry.resolve(text)
    say(resolved.taken)
    role, _ = role_of(resolved)
    if role == "reward_model" and method is None:
        return _evaluate_reward_model(registry, resolved, config, device, say)
    (resolved,) = find_policies(registry, [reference_text], lambda _: None)
    reference = (
        find_model(registry, config.reference, "policy") if config.reference else reference_of(registry, resolved)
    )
    config = scored_as_trained(config, registry, [resolved])
    drawn = max([config.samples, *config.best_of])
    bench = set_up(registry, config, resolved, device, reference=reference, samples=drawn, seed=config.seed, say=say)
    samples = measured(bench, resolved)
    if not config.decoding.is_plain:
        policy = bench.policy(resolved)
        own = draw(policy, without_decoder(bench).plan)
        _add_kl(bench, own, policy)
        take_from_policy(samples, own)
    return {
        "model": resolved.label,
        "stage": resolved.stage,
        "reference": reference.label if reference is not None else None,
        "reward_model": bench.scorer.label if bench.scorer is not None else None,
        "judge": bench.judge.label if bench.judge is not None else None,
        "true_reward": bench.truth_label,
        "prompts": len(bench.plan.prompts),
        "samples": bench.plan.samples,
        "decoding": config.decoding.model_dump(),
        "data": bench.data,
        "data_changed": bench.data_changed,
        "metrics": Interval.table(samples.table()),
        "in_context": samples.facts,
        "accuracy": _accuracy(bench, resolved),
        "best_of_n": best_of_n_rows(bench, samples, resolved.label, config.best_of),
    }


def _accuracy(bench: Bench, resolved: Resolved) -> dict[str, Interval] | None:
    """Of in-context DPO, the accuracy of its contrast and of other scorers on pairs of its source; else None."""
    if resolved.method != "icdpo":
        return None
    return Interval.table(pair_accuracy(bench, resolved, pairs_of_source(bench, resolved)))


def _evaluate_reward_model(
    registry: Registry,
    resolved: Resolved,
    config: EvaluateConfig,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    verify_files(resolved)
    if resolved.manifest is None or not resolved.manifest.config.get("dataset_name"):
        raise ConfigError(Fault(resolved.label, "its preference data are not known", "a reward model of the registry"))
    trained = {k: v for k, v in resolved.manifest.config.items() if v is not None}
    if config.prompts:
        read = {"dataset_config": config.dataset_config, "column_mapping": config.column_mapping}
        trained |= {"dataset_name": config.prompts, "dataset_test_name": None, **read}
    with nullcontext() if config.prompts else owned_by(resolved, trained):
        training = load_config("train-rm", None, extra=trained).of(RewardConfig)
        data, kind = StageData(training, registry.home, say), preference_kind(training)
        changed = [] if config.prompts else changes_of(resolved, data.sources(kind))
    tokenizer = tokenizer_of(resolved, config.trust_remote_code, config)
    for change in changed:
        say(f"note: {change.text}")
    train, _ = data.split(kind, training.dataset_train_split, tokenizer, required=False)
    held_out, reports = data.split(kind, config.split, tokenizer)
    model = load_reward_model(resolved, config, device)
    held_out = made_once(held_out)
    scores = score_examples(
        model,
        held_out,
        responses_at_once=config.per_device_eval_batch_size,
        memory=Memory(say, advice=MEASURING_ADVICE),
        device=device,
    )
    metrics = describe_pairs(scores, held_out)
    metrics["baselines"] = baselines(train, held_out)
    return {
        "model": resolved.label,
        "stage": "reward",
        "reward_shift": model.reward_shift,
        "data": [report.to_dict() for report in reports],
        "data_changed": changed,
        "metrics": metrics,
    }
