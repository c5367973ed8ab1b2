"""Direct preference optimisation (Rafailov et al. 2023); reference log-probabilities are computed once and cached."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import correct
from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.data.examples import first_lengths
from rlhf_pipeline.models.modules import Policy, assert_independent
from rlhf_pipeline.registry.lineage import COLLECTED, stands_apart
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.stages.common import find_base, find_model, load_policy, require_same_tokenizer, tokenizer_of
from rlhf_pipeline.stages.kto import kto_step, labelled_responses, with_margins
from rlhf_pipeline.stages.moving_reference import following
from rlhf_pipeline.stages.preference_pairs import Pairs, ReferenceScores, fresh_pairs, recorded_pairs
from rlhf_pipeline.stages.publish import inputs_of, log_moves, publish
from rlhf_pipeline.stages.result import StageResult
from rlhf_pipeline.stages.starts import load_policy_and_reference
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.loop import Step
from rlhf_pipeline.training.open_run import Run, open_run
from rlhf_pipeline.training.pairs import (
    Criterion,
    first_completions,
    preference_loss,
    response_logprobs,
    split_pairs,
    total_pairs,
)
from rlhf_pipeline.training.session import Plan, train
from rlhf_pipeline.training.trl_engine.train import train_with_trl
from rlhf_pipeline.training.windows import ExampleBatch, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dpo_step(
    model: Policy,
    micro_batch: ExampleBatch,
    *,
    criterion: Criterion,
    reference: ReferenceScores | None,
    meter: CostMeter,
    shape: ModelShape,
    targets: Tensor | None = None,
    margins: Tensor | None = None,
) -> Loss:
    """Preference loss of a micro-batch; its denominator is prompts (equal to pairs if there are no rankings).

    Beside it, if the criterion has an SFT weight, the SFT loss of the chosen responses (in rankings: the best), whose
    denominator is their tokens.

    Each untied pair of a ranking has the weight 1 / (number of its untied pairs); `plackett_luce` reads the whole
    ranking. Metrics are means over pairs; rewards/* are `Criterion.rewards`.

    Args:
        reference: (examples, K) log-probabilities of all examples, or a function that scores a batch under the frozen
            reference; None for a loss without one.
        targets: (examples,) probability that the chosen response of each pair is preferred; None: the label is certain.
        margins: (examples,) margin of each pair; None: 0.
        A micro-batch with `facts` of its own uses these instead of `reference` and `targets`.
    """
    batch, weight, compared = micro_batch.batch, micro_batch.weight, micro_batch.compared
    scores = model(batch)
    meter.train(shape, batch)
    meter.tokens_trained += batch.active_tokens
    logprobs = response_logprobs(criterion, batch, scores.logprobs)
    known = micro_batch.facts
    target = None if targets is None else targets[micro_batch.indices].to(logprobs)
    ref_logprobs: Tensor | None = None
    if known is not None:
        ref_logprobs, target = known.ref_logprobs.to(logprobs).view(-1), known.target.to(logprobs)
    elif isinstance(reference, Tensor):
        rows = reference[micro_batch.indices].to(logprobs.device)
        ref_logprobs = rows[:, :2].reshape(-1) if compared is None else compared.gather(rows)
    elif criterion.needs_reference:
        assert reference is not None  # required if the micro-batch has no facts
        with torch.no_grad():
            ref_logprobs = response_logprobs(criterion, batch, reference(batch).logprobs)
        meter.score(shape, batch)
    margin = None if margins is None else margins[micro_batch.indices].to(logprobs)
    result = preference_loss(criterion, logprobs, ref_logprobs, batch.lengths, compared, target=target, margin=margin)
    chosen, rejected = split_pairs(logprobs.detach(), compared)
    chosen_rewards, rejected_rewards = result.chosen_rewards, result.rejected_rewards
    pairs = {
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/margins": (chosen_rewards - rejected_rewards).sum(),
        "rewards/accuracies": correct(chosen_rewards, rejected_rewards).sum(),
        "logps/chosen": chosen.sum(),
        "logps/rejected": rejected.sum(),
    }
    checked = {"log-probabilities of the policy": logprobs}
    if ref_logprobs is not None:
        checked["log-probabilities of the reference"] = ref_logprobs
        pairs["logps/chosen_minus_reference"] = (chosen - split_pairs(ref_logprobs, compared)[0]).sum()
    metrics = {name: (value * weight, "pairs") for name, value in pairs.items()}
    metrics["entropy"] = (scores.entropy.sum() * weight, "tokens")
    terms = {"dpo": (result.loss * weight, "prompts", 1.0)}
    if criterion.sft_weight:
        best = first_completions(batch.num_completions, compared).to(logprobs.device)[batch.completion_index]
        terms["sft"] = (-(scores.logprobs * best).sum() * weight, "chosen_tokens", criterion.sft_weight)
    return Loss(terms, metrics, checked)


def chosen_tokens(pairs: Pairs, config: DpoConfig) -> float:
    """Mean number of tokens of the chosen responses (in rankings: the best).

    For pairs that are drawn at every step, the largest possible length.
    """
    lengths = first_lengths(pairs.examples)
    return sum(lengths) / len(lengths) if lengths else float(config.sampled_lengths().response)


def find_reference(run: Run, parent: Resolved) -> Resolved:
    """Find the reference of a run that starts from `parent`; log if PPO would measure KL to another model."""
    name = run.config.ref_model
    found = find_model(run.registry, name, "policy") if name else parent
    if stands_apart(run.registry, found, parent):
        run.log.say(
            f"note: ref_model {found.label} is neither {parent.label}, the start of training, nor one of its "
            f"ancestors; DPO measures KL and implicit reward to {found.label}, PPO to {parent.label}"
        )
    return found


def reference_identity(config: DpoConfig, reference: Resolved, parent: Resolved) -> str | None:
    """What the log-probabilities of a reference are cached by, besides the examples; None: not at all."""
    known_as = reference.identity
    if known_as is not None and reference.base is not None and not config.use_peft:
        return f"{known_as} merged"  # equal up to rounding
    if known_as is not None and reference.label == parent.label and config.load_in_4bit:
        return f"{known_as} {FourBits.of(config)}"
    return known_as


def rows_read(pairs: Pairs, labelled: bool) -> int:
    """The number of pairs of a run; of labelled responses, that of their rows: a pair's two responses are one."""
    if labelled:
        return len({example.where for example in pairs.examples})
    return total_pairs(pairs.examples) or sum(report.kept for report in pairs.reports)


def say_flips(run: Run[DpoConfig], sources: Iterable[str]) -> None:
    """Say of which collected sources robust DPO corrects another share of flipped labels than was flipped in them."""
    rate = run.config.label_smoothing
    for source in dict.fromkeys(sources) if "robust" in run.config.loss_names else ():
        if not source.startswith(COLLECTED):
            continue
        recorded = run.registry.resolve_data(source.removeprefix(COLLECTED)).config.get("flip_rate") or 0.0
        if recorded != rate:
            run.log.say(
                f"note: loss_type robust corrects a share label_smoothing {rate:g} of flipped labels, but {source} was "
                f"collected with flip_rate {recorded:g}: only the right share gives DPO's optimum"
            )


def run_dpo(config: DpoConfig, home: Path, **options) -> StageResult:
    """Train a policy on preference pairs or rankings with DPO and register it."""
    with open_run("dpo", config, home, **options) as run:
        config = run.config
        # 1. Policy and, if the loss reads one, frozen reference; they share no weights that are trained.
        parent = find_base(run, config)
        parents = {"base": parent}
        frozen, known_as = None, None
        if config.needs_reference:
            parents["reference"] = find_reference(run, parent)
        tokenizer: PreTrainedTokenizerBase = tokenizer_of(parent, config.trust_remote_code, config)
        if config.needs_reference:
            ref_parent = parents["reference"]
            if config.ref_model:
                require_same_tokenizer(parent, ref_parent, tokenizer, config.trust_remote_code)
            policy, frozen = load_policy_and_reference(parent, config, tokenizer, run.loads_on, reference=ref_parent)
            assert_independent(policy, frozen)
            known_as = reference_identity(config, ref_parent, parent)
            run.placed(policy, frozen)
        else:
            policy = load_policy(parent, config, tokenizer, run.loads_on)
            run.placed(policy)

        # 2. The pairs, and their log-probabilities under the reference.
        labelled = config.loss_type in UNPAIRED
        source = labelled_responses if labelled else fresh_pairs if config.population else recorded_pairs
        pairs = source(run, policy, frozen, known_as, tokenizer)
        if config.sync_ref_model:
            assert frozen is not None
            moving = following(pairs.windows, policy, frozen, share=config.mixup_alpha, every=config.sync_steps)
            pairs = replace(pairs, windows=moving)
            if pairs.evaluate is not None:
                run.log.say(
                    "eval_* figures are measured to the reference that the run begins with, which does not move"
                )
        log_moves(run, parents)
        say_flips(run, [report.source for report in pairs.reports])

        # 3. Train.
        starts_there = config.needs_reference and parents["reference"].label == parent.label
        shape = ModelShape.of(policy.model, checkpointed=config.gradient_checkpointing)
        read: dict[str, Any] = {"reference": pairs.reference, "meter": run.meter, "shape": shape}
        if labelled:
            assert pairs.targets is not None
            step: Step = functools.partial(kto_step, config=config, desirable=pairs.targets, **read)
        else:
            known: dict[str, Any] = {"targets": pairs.targets, "margins": pairs.margins}
            step = functools.partial(dpo_step, criterion=Criterion.of(config), **known, **read)
        plan = Plan(
            pairs.windows,
            step,
            pairs.total,
            shown=("loss/dpo", "rewards/accuracies", "rewards/margins", "logps/chosen", "learning_rate"),
            derive=with_margins if labelled else dict,
            model=policy.model,
            tokenizer=tokenizer,
            inputs=inputs_of(parents, pairs.reports),
            evaluate=pairs.evaluate,
            known={"tokens": chosen_tokens(pairs, config), "from_reference": starts_there},
        )
        if config.engine == "trl":
            reference = None if frozen is None else frozen.model
            last = train_with_trl(run, plan, examples=pairs.examples, shape=shape, reference=reference)
        else:
            last = train(run, policy, plan)
        fall = last.get("logps/chosen_minus_reference", 0.0)
        if fall < -1e-4:
            run.log.say(
                f"the log-probability of the chosen responses is {-fall:.3g} nats below the reference: DPO raises the "
                "margin, not the chosen response itself (this alone is no fault)"
            )

        # 4. Evaluate and register.
        metrics = {
            "train": last,
            "health": plan.health,
            **(pairs.evaluate() if pairs.evaluate is not None else {}),
            "train_pairs": rows_read(pairs, labelled),
        }
        return publish(run, plan, parents=parents, reports=pairs.reports, metrics=metrics)
