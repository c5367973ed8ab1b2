"""Direct preference optimisation (Rafailov et al. 2023); reference log-probabilities are computed once and cached."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import OBJECTIVES, correct, smoothed_target
from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.data.examples import first_lengths
from rlhf_pipeline.models.modules import Policy, assert_independent
from rlhf_pipeline.registry.lineage import stands_apart
from rlhf_pipeline.stages.common import find_base, find_model, require_same_tokenizer, tokenizer_of
from rlhf_pipeline.stages.kto import kto_step, labelled_responses, with_margins
from rlhf_pipeline.stages.preference_pairs import Pairs, ReferenceScores, fresh_pairs, recorded_pairs
from rlhf_pipeline.stages.publish import inputs_of, log_moves, publish
from rlhf_pipeline.stages.result import StageResult
from rlhf_pipeline.stages.starts import load_policy_and_reference
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.loop import Step
from rlhf_pipeline.training.open_run import open_run
from rlhf_pipeline.training.pairs import preference_loss, split_pairs, total_pairs
from rlhf_pipeline.training.session import Plan, train
from rlhf_pipeline.training.trl_engine.train import train_with_trl
from rlhf_pipeline.training.windows import ExampleBatch, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dpo_step(
    model: Policy,
    micro_batch: ExampleBatch,
    *,
    beta: float,
    reference: ReferenceScores | None,
    meter: CostMeter,
    shape: ModelShape,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    targets: Tensor | None = None,
    margins: Tensor | None = None,
) -> Loss:
    """Preference loss of a micro-batch; its denominator is prompts (equal to pairs if there are no rankings).

    Each untied pair of a ranking has the weight 1 / (number of its untied pairs); `plackett_luce` reads the whole
    ranking. Metrics are means over pairs; rewards/* are beta x summed log-ratio for every loss.

    Args:
        reference: (examples, K) log-probabilities of all examples, or a function that scores a batch under the frozen
            reference.
        targets: (examples,) probability that the chosen response of each pair is preferred; None: the label is certain.
        margins: (examples,) margin of each pair; None: 0.
        A micro-batch with `facts` of its own uses these instead of `reference` and `targets`.
    """
    objective = OBJECTIVES[loss_type]
    batch, weight, compared = micro_batch.batch, micro_batch.weight, micro_batch.compared
    scores = model(batch)
    meter.train(shape, batch)
    meter.tokens_trained += batch.active_tokens
    logprobs = batch.per_completion(scores.logprobs)
    known = micro_batch.facts
    target = None if targets is None else targets[micro_batch.indices].to(logprobs)
    if known is not None:
        ref_logprobs, target = known.ref_logprobs.to(logprobs).view(-1), known.target.to(logprobs)
    elif isinstance(reference, Tensor):
        rows = reference[micro_batch.indices].to(logprobs.device)
        ref_logprobs = rows[:, :2].reshape(-1) if compared is None else compared.gather(rows)
    else:
        assert reference is not None  # required if the micro-batch has no facts
        with torch.no_grad():
            ref_logprobs = batch.per_completion(reference(batch).logprobs)
        meter.score(shape, batch)
    result = preference_loss(
        objective,
        logprobs,
        ref_logprobs,
        batch.lengths,
        compared,
        beta=beta,
        target=smoothed_target(target, label_smoothing),
        margin=None if margins is None else margins[micro_batch.indices].to(logprobs),
    )
    (chosen, rejected), (ref_chosen, _) = (split_pairs(x, compared) for x in (logprobs.detach(), ref_logprobs))
    chosen_rewards, rejected_rewards = result.chosen_rewards, result.rejected_rewards
    pairs = {
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/margins": (chosen_rewards - rejected_rewards).sum(),
        "rewards/accuracies": correct(chosen_rewards, rejected_rewards).sum(),
        "logps/chosen": chosen.sum(),
        "logps/rejected": rejected.sum(),
        "logps/chosen_minus_reference": (chosen - ref_chosen).sum(),
    }
    metrics = {name: (value * weight, "pairs") for name, value in pairs.items()}
    metrics["entropy"] = (scores.entropy.sum() * weight, "tokens")
    checked = {"log-probabilities of the policy": logprobs, "log-probabilities of the reference": ref_logprobs}
    return Loss({"dpo": (result.loss * weight, "prompts", 1.0)}, metrics, checked)


def chosen_tokens(pairs: Pairs, config: DpoConfig) -> float:
    """Mean number of tokens of the chosen responses (in rankings: the best).

    For pairs that are drawn at every step, the largest possible length.
    """
    lengths = first_lengths(pairs.examples)
    return sum(lengths) / len(lengths) if lengths else float(config.sampled_lengths().response)


def run_dpo(config: DpoConfig, home: Path, **options) -> StageResult:
    """Train a policy on preference pairs or rankings with DPO and register it."""
    with open_run("dpo", config, home, **options) as run:
        config = run.config
        # 1. Policy and frozen reference; they share no weights that are trained.
        parent = find_base(run, config)
        ref_parent = find_model(run.registry, config.ref_model, "policy") if config.ref_model else parent
        if stands_apart(run.registry, ref_parent, parent):
            run.log.say(
                f"note: ref_model {ref_parent.label} is neither {parent.label}, the start of training, nor one of its "
                f"ancestors; DPO measures KL and implicit reward to {ref_parent.label}, PPO to {parent.label}"
            )
        tokenizer: PreTrainedTokenizerBase = tokenizer_of(parent, config.trust_remote_code, config)
        if config.ref_model:
            require_same_tokenizer(parent, ref_parent, tokenizer, config.trust_remote_code)
        policy, frozen = load_policy_and_reference(parent, config, tokenizer, run.loads_on, reference=ref_parent)
        assert_independent(policy, frozen)
        run.placed(policy, frozen)

        # 2. The pairs, and their log-probabilities under the reference.
        known_as = ref_parent.identity
        if known_as is not None and ref_parent.base is not None and not config.use_peft:
            known_as += " merged"  # equal up to rounding
        elif known_as is not None and ref_parent.label == parent.label and config.load_in_4bit:
            known_as += f" {FourBits.of(config)}"
        labelled = config.loss_type in UNPAIRED
        source = labelled_responses if labelled else fresh_pairs if config.population else recorded_pairs
        pairs = source(run, policy, frozen, known_as, tokenizer)
        parents = {"base": parent, "reference": ref_parent}
        log_moves(run, parents)

        # 3. Train.
        shape = ModelShape.of(policy.model, checkpointed=config.gradient_checkpointing)
        read: dict[str, Any] = {"reference": pairs.reference, "meter": run.meter, "shape": shape}
        step: Step = functools.partial(
            dpo_step,
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            targets=pairs.targets,
            margins=pairs.margins,
            **read,
        )
        if labelled:
            assert pairs.targets is not None
            step = functools.partial(kto_step, config=config, desirable=pairs.targets, **read)
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
            known={"tokens": chosen_tokens(pairs, config), "from_reference": ref_parent.label == parent.label},
        )
        if config.engine == "trl":
            last = train_with_trl(run, plan, examples=pairs.examples, shape=shape, reference=frozen.model)
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
            "train_pairs": total_pairs(pairs.examples) or sum(report.kept for report in pairs.reports),
        }
        return publish(run, plan, parents=parents, reports=pairs.reports, metrics=metrics)
