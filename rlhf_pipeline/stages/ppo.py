"""PPO: `ppo_windows` and `ppo_step` are the algorithm, `run_ppo` is the stage around it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.advantages import gae, token_rewards
from rlhf_pipeline.algorithms.masked import whiten
from rlhf_pipeline.algorithms.policy import PolicyLoss, clipped_policy_loss, clipped_value_loss
from rlhf_pipeline.config.ppo import WARMUP_OFFSET, PpoConfig
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.models.modules import ActorCritic, TokenScores
from rlhf_pipeline.models.sharding import leave_out_actor
from rlhf_pipeline.rollout.rollout import Estimates
from rlhf_pipeline.stages.common import find_base, tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.stages.ppo_models import check_processes, load_setup
from rlhf_pipeline.stages.publish import inputs_of, log_moves, publish
from rlhf_pipeline.stages.result import StageResult
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.open_run import open_run
from rlhf_pipeline.training.optimizer import require_schedule
from rlhf_pipeline.training.ppo_batches import PpoBatch
from rlhf_pipeline.training.ppo_rollouts import (
    PpoSetup,
    check_and_describe,
    minibatch_window,
    sample_responses,
    score_responses,
    shuffled_minibatches,
)
from rlhf_pipeline.training.session import Metrics, Plan, train
from rlhf_pipeline.training.windows import Loss, Window


def ppo_windows(setup: PpoSetup, module: nn.Module, start: int) -> Iterator[Window]:
    """Yield PPO's minibatches from update `start` on; the loop takes one optimizer step on each, with `ppo_step`.

    Source: Ouyang et al. 2022 (InstructGPT), section 3.5; Schulman et al. 2017, algorithm 1. For C responses of at most
    R tokens, scores are (C,) and all other tensors (C, R). `module` is the actor-critic, wrapped or not.
    """
    config, reduce = setup.config, setup.reduce
    for update in range(start, config.updates):
        setup.actor_critic.actor_frozen = update < config.critic_warmup_steps
        leave_out_actor(setup.actor_critic, setup.actor_critic.actor_frozen)

        # 1. Sample a response to each prompt; shuffle the rollout into minibatches for each epoch.
        sampled = sample_responses(setup, module, update)
        epochs = shuffled_minibatches(setup, sampled, update)

        # 2. Score: log-probabilities of policy and reference, values of the critic, a score for each response.
        scored = score_responses(setup, module, update, sampled, epochs)
        rollout, mask = scored.rollout, scored.rollout.mask

        # 3. Token rewards: -beta (log pi - log pi_ref), plus the score at the last token.
        logprobs, ref_logprobs = rollout.logprobs, rollout.ref_logprobs
        rewards = token_rewards(rollout.scores, logprobs, ref_logprobs, mask, kl_coef=config.kl_coef)
        if config.whiten_rewards:  # off by default: it moves the optimum
            rewards = whiten(rewards, mask, shift_mean=False, reduce=reduce)

        # 4. Advantages and returns by GAE. Whitening the advantages changes only the scale of the step.
        advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=reduce)
        estimates = Estimates(rewards, advantages, returns, rollout.importance(config.importance_weight_cap))
        metrics = check_and_describe(setup, scored, estimates)

        # 5. Train: several epochs, each with an optimizer step per minibatch.
        with setup.meter.part("update"):
            for epoch in range(config.num_ppo_epochs):
                for number in range(config.num_mini_batches):
                    yield minibatch_window(setup, scored, estimates, metrics, epoch, number)


def ppo_step(
    model: ActorCritic, micro_batch: PpoBatch, *, config: PpoConfig, meter: CostMeter, shapes: dict[str, ModelShape]
) -> Loss:
    """Loss of a micro-batch: clipped policy loss + vf_coef x clipped value loss, as sums over its tokens."""
    batch, mask = micro_batch.batch, micro_batch.mask
    scores = model(batch)
    count_training(meter, shapes, batch, actor=scores.logprobs.requires_grad)
    logprobs, values = (batch.padded(part, mask.shape[1]) for part in (scores.logprobs, scores.values))

    # 6. Policy loss: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old.
    old, advantages, weights = micro_batch.old_logprobs, micro_batch.advantages, micro_batch.weights
    policy = clipped_policy_loss(logprobs, old, advantages, mask, cliprange=config.cliprange, weights=weights)

    # 7. Value loss: .5 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2).
    old_values, returns = micro_batch.old_values, micro_batch.returns
    value, clipped = clipped_value_loss(values, old_values, returns, mask, cliprange_value=config.cliprange_value)

    # During critic warm-up the actor has no graph, so the policy loss is only reported.
    per = config.loss_normalization
    terms: dict[str, tuple[Tensor, str, float]]
    terms = {"loss/value_avg": (value, per, config.vf_coef), "loss/policy_avg": (policy.loss, per, 1.0)}
    checked = {"log-probabilities of the policy": scores.logprobs, "values": scores.values}
    return Loss(terms, step_metrics(micro_batch, scores, logprobs, policy, clipped), checked)


def count_training(meter: CostMeter, shapes: dict[str, ModelShape], batch: PackedBatch, *, actor: bool) -> None:
    """Count the cost of a training pass of actor and critic; a frozen actor (critic warm-up) counts a forward pass."""
    meter.tokens_trained += batch.active_tokens
    trains = {"actor": actor, "critic": True}
    for name in trains.keys() & shapes.keys():
        (meter.train if trains[name] else meter.score)(shapes[name], batch)


def step_metrics(
    micro_batch: PpoBatch, scores: TokenScores, logprobs: Tensor, policy: PolicyLoss, value_clipped: Tensor
) -> dict[str, tuple[Tensor, str]]:
    """Metrics of a micro-batch under TRL's names: sums with the names of their denominators."""
    assert scores.entropy is not None
    metrics = {
        "policy/approxkl_avg": (policy.approx_kl, "tokens"),
        "policy/clipfrac_avg": (policy.clipped, "tokens"),
        "policy/entropy_avg": (scores.entropy.sum(), "tokens"),
        "val/ratio": (policy.ratio, "tokens"),
        "val/ratio_square": (policy.ratio_square, "tokens"),
        "val/clipfrac_avg": (value_clipped, "tokens"),
    }
    if micro_batch.first:
        with torch.no_grad():
            difference = (logprobs - micro_batch.old_logprobs).exp() - 1
            distance = torch.where(micro_batch.mask, difference, 0.0).abs().max()
        metrics["first_minibatch/ratio_error"] = (distance * micro_batch.share, "first_batches")
        metrics["first_minibatch/clipfrac"] = (policy.clipped, "first_tokens")
    return metrics


def derive(metrics: Metrics) -> Metrics:
    """Replace E[ratio^2] by the variance of the ratio, E[ratio^2] - E[ratio]^2."""
    metrics = dict(metrics)
    square = metrics.pop("val/ratio_square", 0.0)
    metrics["val/ratio_var"] = max(square - metrics.get("val/ratio", 0.0) ** 2, 0.0)
    return metrics


def run_ppo(config: PpoConfig, home: Path, **options) -> StageResult:
    """Train an actor-critic by PPO and register the actor."""
    with open_run("ppo", config, home, **options) as run:
        config = run.config
        parent = find_base(run, config)
        tokenizer = tokenizer_of(parent, config.trust_remote_code, config)
        check_processes(config, run.accelerator.num_processes)
        require_schedule(config, config.updates, offset=WARMUP_OFFSET)
        # 1. Prompts.
        data = StageData(config, run.registry.home, run.log.say)
        prompts, reports = data.training(tokenizer)

        # 2. Actor, critic, frozen reference (loaded separately from the actor's files), rewards, judge.
        setup, parents = load_setup(run, parent, tokenizer, prompts)
        log_moves(run, parents)

        # 3. Train.
        shown = ("scores", "judge", "kl", "rlhf_reward")
        plan = Plan(
            functools.partial(ppo_windows, setup),
            functools.partial(ppo_step, config=config, meter=run.meter, shapes=setup.shapes),
            config.updates,
            shown=(*(f"objective/{name}" for name in shown), "val/ended", "val/explained_variance"),
            model=setup.actor_critic.actor,
            tokenizer=tokenizer,
            inputs=inputs_of(parents, reports),
            derive=derive,
            warmup_offset=WARMUP_OFFSET,
        )
        with contextlib.closing(setup):
            last = train(run, setup.actor_critic, plan)

        # 4. Register the actor.
        metrics = {"train": last, "health": plan.health, "prompts": len(prompts)}
        return publish(run, plan, parents=parents, reports=reports, metrics=metrics)
