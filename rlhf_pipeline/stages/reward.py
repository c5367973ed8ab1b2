"""The reward model: Bradley-Terry training on pairs and rankings, normalisation, comparison with two baselines."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import bradley_terry_loss, centering_loss, correct
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.data.examples import Example, count_cut, made_once, pick, prompt_keys
from rlhf_pipeline.data.tokenize import cut_prompt
from rlhf_pipeline.data.tokenizers import stop_ids, with_padding
from rlhf_pipeline.disk.storage import replace_text
from rlhf_pipeline.evaluation.preference_metrics import calibration_slope, pair_differences
from rlhf_pipeline.models.loading import store_reward_shift
from rlhf_pipeline.models.modules import RewardModel
from rlhf_pipeline.models.selfcheck import read_reward_model
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.responses import prompts_run, sample_for_prompts
from rlhf_pipeline.rollout.scoring import most_responses
from rlhf_pipeline.stages.common import example_schedule, find_base, load_policy, onto, tokenizer_of
from rlhf_pipeline.stages.data import StageData, preference_kind
from rlhf_pipeline.stages.gate import CUT, CUT_REMEDY, cut_minus_ended, gate_of, prefers_cut
from rlhf_pipeline.stages.publish import inputs_of, log_moves, publish
from rlhf_pipeline.stages.result import StageResult
from rlhf_pipeline.stages.reward_quality import (
    baseline_accuracies,
    cached_baseline_differences,
    describe_pairs,
    score_examples,
)
from rlhf_pipeline.stages.starts import new_reward_model
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.open_run import Run, open_run
from rlhf_pipeline.training.pairs import recorded_margins, split_pairs, total_pairs
from rlhf_pipeline.training.session import Plan, train
from rlhf_pipeline.training.trl_engine.train import train_with_trl
from rlhf_pipeline.training.windows import ExampleBatch, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reward_step(
    model: RewardModel,
    micro_batch: ExampleBatch,
    *,
    meter: CostMeter,
    shape: ModelShape,
    center_rewards_coefficient: float | None = None,
    margins: Tensor | None = None,
) -> Loss:
    """Bradley-Terry loss of a micro-batch; its denominator is prompts (equal to pairs if there are no rankings).

    A ranking is one tree, read in one pass; each of its untied pairs has the weight 1 / (number of its untied pairs).
    Metrics are means over pairs. margins: (examples,) margin of each pair; None: 0.
    """
    scores = model(micro_batch.batch)
    meter.train(shape, micro_batch.batch)
    meter.tokens_trained += micro_batch.batch.active_tokens
    chosen, rejected = split_pairs(scores, micro_batch.compared)
    shares = None if micro_batch.compared is None else micro_batch.compared.weight(scores)
    weight = micro_batch.weight
    margin = None if margins is None else margins[micro_batch.indices].to(scores)
    terms = {"bradley_terry": (bradley_terry_loss(chosen, rejected, margin, weight=shares) * weight, "prompts", 1.0)}
    if center_rewards_coefficient:
        centering = centering_loss(chosen, rejected, weight=shares) * weight
        terms["centering"] = (centering, "prompts", center_rewards_coefficient)
    with torch.no_grad():
        metrics = {
            "accuracy": correct(chosen, rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "chosen_score": chosen.sum(),
            "rejected_score": rejected.sum(),
        }
    checked = {"scores": scores}
    return Loss(terms, {name: (value * weight, "pairs") for name, value in metrics.items()}, checked)


NO_SLOPE = "undefined: all held-out pairs are ordered correctly, wrongly or as ties, so no finite slope fits"
Scores = Callable[[Sequence[Example]], list[list[float]]]


CENTERING = "centering.json"


def responses_to_center(
    run: Run, parent: Resolved, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The parent's samples whose mean score will be 0; none if `reward_centering` takes other responses.

    They do not depend on training, so they are sampled before it: a signal then stops the run at once, and a parent
    that cannot sample is found first. A resumed run reads them from runs/<id>/centering.json.
    """
    config = run.config
    if config.reward_centering != "reference_samples":
        return []
    stored, count, limits = run.directory / CENTERING, config.reward_centering_samples, config.sampled_lengths()
    prompts = _prompts_to_center(examples, count, limits.prompt, tokenizer.bos_token_id)
    if run.checkpoint is not None and (found := _stored_responses(stored, prompts)):
        return found
    run.log.say(
        f"reward_centering: sampling {count} responses of at most {limits.response} tokens from {parent.label} "
        "(reward_centering: chosen needs none)"
    )
    with run.meter.part("centering"):
        policy = load_policy(parent, config, tokenizer, run.device, frozen=True)
        most = max(64, config.per_device_eval_batch_size)
        at_once: dict[str, Any] = {"responses_at_once": most, "memory": run.memory}
        options: dict[str, Any] = {"response_length": limits.response, "device": run.device}
        sampled, _ = sample_for_prompts(
            policy,
            prompts,
            samples=1,
            stop_ids=stop_ids(tokenizer),
            generator=torch.Generator().manual_seed(config.seed),
            **at_once,
            **options,
        )
        run.meter.generate(ModelShape.of(policy.model), sampled, prompts_run(policy, sampled, **at_once, **options))
    drawn = [len(example.completions[0]) for example in sampled]
    ended = sum(example.ended[0] for example in sampled)
    run.log.say(f"reward_centering: {ended} of {count} responses ended; mean length {sum(drawn) / count:.1f} tokens")
    if run.accelerator.is_main_process:
        rows = [(example.completions[0], example.ended[0]) for example in sampled]
        replace_text(stored, json.dumps(rows) + "\n")
    return sampled


def _prompts_to_center(examples: Sequence[Example], count: int, longest: int, bos: int | None) -> list[Example]:
    numbers = {key: number for number, key in enumerate(prompt_keys(examples))}
    distinct = pick(examples, list(numbers.values())[:count])
    distinct = [replace(one, prompt_ids=cut_prompt(one.prompt_ids, longest, bos)) for one in distinct]
    return [distinct[i % len(distinct)] for i in range(count)]


def _stored_responses(path: Path, prompts: Sequence[Example]) -> list[Example]:
    """The responses that the run sampled before it was interrupted; none if there is no readable file of them."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            replace(prompt, completions=[ids], ended=[ended], label_probability=None, completion_texts=(), ranks=None)
            for prompt, (ids, ended) in zip(prompts, rows, strict=True)
        ]
    except (OSError, ValueError, TypeError):
        return []


def center(
    run: Run, model: RewardModel, score: Scores, sampled: Sequence[Example], examples: Sequence[Example]
) -> dict[str, Any]:
    """Store the shift that gives the parent's samples a mean score of 0.

    With `reward_centering: chosen` the chosen responses (in rankings: the best) get the mean score 0.

    Returns:
        the metrics `reward_shift` and, if the parent's samples were scored, `cut_minus_ended`.
    """
    centering = run.config.reward_centering
    if centering == "none":
        return {"reward_shift": 0.0}
    scores = [row[0] for row in score(examples if centering == "chosen" else sampled)]
    mean = sum(scores) / len(scores)
    store_reward_shift(model.model, mean)
    trained = count_cut(examples)
    cut = cut_minus_ended(scores, [example.ended[0] for example in sampled], trained) if sampled else None
    if told := prefers_cut(cut):
        run.log.say(f"WARNING: this reward model {told}; {CUT_REMEDY}", style="yellow")
    return {"reward_shift": mean} | ({} if cut is None else {CUT: cut})


def run_reward(config: RewardConfig, home: Path, **options) -> StageResult:
    """Train a reward model on preference pairs or rankings and register it."""
    with open_run("reward", config, home, **options) as run:
        config = run.config
        # 1. The trunk of a language model with a new scalar head.
        parent = find_base(run, config)
        tokenizer: PreTrainedTokenizerBase = tokenizer_of(parent, config.trust_remote_code, config)
        padded = with_padding(tokenizer, new=not config.use_peft)  # an adapter leaves the embedding as it is
        network = onto(run.loads_on, new_reward_model(parent, config, padded))
        model = read_reward_model(network).train()
        run.placed(model)
        if config.score_pooling == "mean":
            run.log.say("score_pooling mean: transformers itself reads only the last token and gives other scores")
        log_moves(run, {"base": parent})

        # 2. The pairs and rankings.
        data, kind = StageData(config, run.registry.home, run.log.say), preference_kind(config)
        examples, reports = data.training(tokenizer)
        held_out, _ = data.held_out(kind, tokenizer)
        margins = recorded_margins(examples) if config.use_margin else None

        # 3. Responses to centre the scores on, then training.
        windows, total = example_schedule(run, examples, layout=model.reader.layout)
        sampled = responses_to_center(run, parent, examples, tokenizer)
        shape = ModelShape.of(network, head=False, checkpointed=config.gradient_checkpointing)

        def scored(rows: Sequence[Example]) -> list[list[float]]:
            return score_examples(
                model,
                rows,
                responses_at_once=config.per_device_eval_batch_size * most_responses(rows),
                memory=run.memory,
                device=run.device,
            )

        def evaluate() -> dict[str, float]:
            rows = made_once(held_out)
            return {f"eval_{k}": v for k, v in describe_pairs(scored(rows), rows).items()}

        step = functools.partial(
            reward_step,
            meter=run.meter,
            shape=shape,
            center_rewards_coefficient=config.center_rewards_coefficient,
            margins=margins,
        )
        plan = Plan(
            windows,
            step,
            total,
            shown=("loss/bradley_terry", "accuracy", "margin", "learning_rate"),
            model=network,
            tokenizer=padded,
            inputs=inputs_of({"base": parent}, reports),
            evaluate=evaluate if held_out else None,
        )
        if config.engine == "trl":
            last = train_with_trl(run, plan, examples=examples, shape=shape)
        else:
            last = train(run, model, plan)

        # 4. Normalise, evaluate against the baselines, register.
        centered = center(run, model, scored, sampled, examples)
        metrics: dict[str, Any] = {
            "train": last,
            "health": plan.health,
            **centered,
            "train_pairs": total_pairs(examples),
        }
        if held_out:
            held_out = made_once(held_out)
            scores = scored(held_out)
            metrics |= describe_pairs(scores, held_out)
            rivals = cached_baseline_differences(examples, held_out, home / "cache")
            metrics["baselines"] = baseline_accuracies(rivals, held_out)
            differences, prompts = pair_differences(scores, held_out)
            slope = calibration_slope(differences, prompts)
            metrics["calibration_slope"] = {"mean": None, "why_not": NO_SLOPE} if slope is None else slope.as_dict()
            metrics["gate"] = gate_of(differences, rivals, prompts)
            describe_quality(run, metrics)
        return publish(run, plan, parents={"base": parent}, reports=reports, metrics=metrics)


def describe_quality(run: Run, metrics: dict[str, Any]) -> None:
    """Log the accuracy of the reward model and its baselines, the calibration slope, and whether the gate failed."""
    line = (
        f"held-out accuracy {metrics['accuracy']:.3f} [{metrics['accuracy_low']:.3f}, {metrics['accuracy_high']:.3f}]"
    )
    if "bayes_accuracy" in metrics:
        line += f", ceiling of the labels {metrics['bayes_accuracy']:.3f}"
    for name, value in metrics["baselines"].items():
        line += f", {name} {value['accuracy']:.3f}"
    run.log.say(line)
    slope = metrics["calibration_slope"]
    if slope["mean"] is None:
        run.log.say(f"calibration slope: {slope['why_not']}")
    else:
        run.log.say(
            f"calibration slope {slope['mean']:.3f} [{slope['low']:.3f}, {slope['high']:.3f}]: PPO on this model has "
            "an effective beta of kl_coef x slope, in units of the reward behind the labels"
        )
    if not metrics["gate"]["passed"]:
        run.log.say(
            f"WARNING: this reward model fails its gate: {metrics['gate']['reason']}; use more or cleaner pairs, a "
            "larger model or another learning_rate before PPO",
            style="yellow",
        )
