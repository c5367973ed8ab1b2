"""PPO, A2C, RLOO and GRPO: `ppo_windows` and `ppo_step` are the algorithm, `run_ppo` is the stage around it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.advantages import gae, token_rewards
from rlhf_pipeline.algorithms.groups import group_advantages, leave_one_out_advantages, to_tokens
from rlhf_pipeline.algorithms.language_model import negative_log_likelihood
from rlhf_pipeline.algorithms.masked import masked_sum, whiten
from rlhf_pipeline.algorithms.policy import (
    PolicyLoss,
    clipped_policy_loss,
    clipped_value_loss,
    kl_loss,
    response_kl_loss,
)
from rlhf_pipeline.config.ppo import WARMUP_OFFSET, PpoConfig
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.models.modules import ActorCritic, TokenScores
from rlhf_pipeline.models.sharding import leave_out_actor
from rlhf_pipeline.rollout.rollout import Estimates
from rlhf_pipeline.stages.common import find_base, tokenizer_of
from rlhf_pipeline.stages.data import StageData, stream_data
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
from rlhf_pipeline.training.ptx import stream_windows, with_stream
from rlhf_pipeline.training.session import Metrics, Plan, train
from rlhf_pipeline.training.shaping import restored, shaped
from rlhf_pipeline.training.windows import ExampleBatch, Loss, Window


def ppo_windows(setup: PpoSetup, module: nn.Module, start: int) -> Iterator[Window]:
    """Yield the minibatches from update `start` on; the loop takes one optimizer step on each, with `ppo_step`.

    Source: Ouyang et al. 2022 (InstructGPT), section 3.5; Schulman et al. 2017, algorithm 1. For C responses of at most
    R tokens, scores are (C,) and all other tensors (C, R). `module` is the actor-critic, wrapped or not.
    """
    config, reduce = setup.config, setup.reduce
    stream = stream_windows(setup, start) if setup.stream else None
    for update in range(start, config.updates):
        setup.actor_critic.actor_frozen = update < (config.critic_warmup_steps or 0)
        leave_out_actor(setup.actor_critic, setup.actor_critic.actor_frozen)

        # 1. Sample responses to each prompt; shuffle the rollout into minibatches for each epoch.
        sampled = sample_responses(setup, module, update)
        epochs = shuffled_minibatches(setup, sampled, update)

        # 2. Score: log-probabilities of policy and reference, values of the critic, a score for each response.
        scored = shaped(setup, score_responses(setup, module, update, sampled, epochs))
        rollout, mask = scored.rollout, scored.rollout.mask

        # 3. Token rewards: -beta (log pi - log pi_ref), plus the score at the last token.
        logprobs, ref_logprobs = rollout.logprobs, rollout.ref_logprobs
        kl_coef = 0.0 if config.kl_in in ("loss", "response_loss") else setup.kl_coef
        rewards = token_rewards(rollout.scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef)
        if config.whiten_rewards:  # off by default: it moves the optimum
            rewards = whiten(rewards, mask, shift_mean=False, reduce=reduce)

        # 4. Advantages. Whitening them changes only the scale of the step.
        returns: Tensor | None = None
        if rollout.values is not None:  # of tokens, by GAE
            assert config.gamma is not None and config.lam is not None
            advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
            if config.whiten_advantages:
                advantages = whiten(advantages, mask, reduce=reduce)
        else:  # of responses, by comparing those to one prompt
            advantages = response_advantages(config, rewards.sum(1))
            if config.whiten_advantages:
                advantages = whiten(advantages, torch.ones_like(advantages, dtype=torch.bool), reduce=reduce)
            advantages = to_tokens(advantages, mask)
        estimates = Estimates(rewards, advantages, returns, rollout.importance(config.importance_weight_cap))
        metrics = check_and_describe(setup, scored, estimates)
        setup.adapt(metrics)

        # 5. Train: several epochs, each with an optimizer step per minibatch.
        with setup.meter.part("update"):
            for epoch in range(config.num_ppo_epochs):
                for number in range(config.num_mini_batches):
                    window = minibatch_window(setup, scored, estimates, metrics, epoch, number)
                    if stream is not None and not setup.actor_critic.actor_frozen:
                        window = with_stream(window, next(stream))
                    yield window


def response_advantages(config: PpoConfig, returns: Tensor) -> Tensor:
    """Advantages (C,) of responses without a critic, from their returns (C,)."""
    if config.algorithm == "rloo":
        return leave_one_out_advantages(returns, config.num_generations)
    return group_advantages(returns, config.num_generations, scale=config.scale_rewards == "group")


def ppo_step(
    model: ActorCritic,
    micro_batch: PpoBatch | ExampleBatch,
    *,
    config: PpoConfig,
    meter: CostMeter,
    shapes: dict[str, ModelShape],
) -> Loss:
    """Loss of a micro-batch, as sums over its tokens: clipped policy loss + vf_coef x clipped value loss.

    The value loss is there with a critic only; with `kl_in: loss`, kl_coef x KL is added. Examples of the pretraining
    stream have their own loss.
    """
    if isinstance(micro_batch, ExampleBatch):
        return ptx_step(model, micro_batch, config=config, meter=meter, shape=shapes["actor"])
    batch, mask = micro_batch.batch, micro_batch.mask
    scores = model(batch)
    count_training(meter, shapes, batch, actor=scores.logprobs.requires_grad)
    logprobs, per = batch.padded(scores.logprobs, mask.shape[1]), config.loss_normalization
    terms: dict[str, tuple[Tensor, str, float]] = {}
    checked = {"log-probabilities of the policy": scores.logprobs}
    weights, shares = micro_batch.weights, None
    if per == "responses":  # the mean over a response's tokens: its optimum depends on lengths if the KL is in the loss
        shares = mask.sum(1, keepdim=True).to(logprobs.dtype).reciprocal().expand(mask.shape)
        weights = shares if weights is None else shares * weights

    # 6. Policy loss: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old.
    old, advantages, eps = micro_batch.old_logprobs, micro_batch.advantages, _limit(config.cliprange)
    policy = clipped_policy_loss(logprobs, old, advantages, mask, cliprange=eps, weights=weights)
    metrics = step_metrics(micro_batch, scores, logprobs, policy)

    # 7. Value loss: .5 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2).
    if micro_batch.old_values is not None:
        assert scores.values is not None and micro_batch.returns is not None and config.vf_coef is not None
        values, old_values = batch.padded(scores.values, mask.shape[1]), micro_batch.old_values
        eps = _limit(config.cliprange_value)
        value, clipped = clipped_value_loss(values, old_values, micro_batch.returns, mask, cliprange_value=eps)
        terms["loss/value_avg"] = (value, per, config.vf_coef)
        metrics["val/clipfrac_avg"] = (clipped, "tokens")
        checked["values"] = scores.values

    # 8. KL in the loss: k3 of each token (the published GRPO), or k2 of each response.
    if micro_batch.ref_logprobs is not None:
        distance = kl_loss if config.kl_in == "loss" else response_kl_loss
        kl = distance(logprobs, micro_batch.ref_logprobs, mask, weights=shares)
        terms["loss/kl_avg"] = (kl, per, config.kl_coef)

    # 9. Entropy bonus: the entropy of each token's distribution, minus as a loss. It moves the optimum.
    if config.entropy_coef:
        assert scores.entropy is not None
        bonus = batch.padded(scores.entropy, mask.shape[1]) * (1.0 if shares is None else shares)
        terms["loss/entropy_avg"] = (-masked_sum(bonus, mask), per, config.entropy_coef)

    # During critic warm-up the actor has no graph, so the policy loss is only reported.
    terms["loss/policy_avg"] = (policy.loss, per, 1.0)
    return Loss(terms, metrics, checked)


def ptx_step(
    model: ActorCritic, micro_batch: ExampleBatch, *, config: PpoConfig, meter: CostMeter, shape: ModelShape
) -> Loss:
    """Loss of a micro-batch of the pretraining stream: ptx_coef x negative log-likelihood, a sum over its tokens.

    Its denominator is the tokens of the stream's batch. Source: Ouyang et al. 2022 (InstructGPT), eq. 2.
    """
    batch = micro_batch.batch
    logprobs = model(batch, pretraining=True).logprobs
    meter.train(shape, batch)
    meter.tokens_trained += batch.active_tokens
    loss = negative_log_likelihood(logprobs) * micro_batch.weight
    checked = {"log-probabilities of the pretraining stream": logprobs}
    return Loss({"loss/ptx_avg": (loss, "ptx_tokens", config.ptx_coef)}, checked=checked)


def _limit(cliprange: float | None) -> float:
    """A clip range; without one nothing is clipped."""
    return math.inf if cliprange is None else cliprange


def count_training(meter: CostMeter, shapes: dict[str, ModelShape], batch: PackedBatch, *, actor: bool) -> None:
    """Count the cost of a training pass of actor and critic; a frozen actor (critic warm-up) counts a forward pass."""
    meter.tokens_trained += batch.active_tokens
    trains = {"actor": actor, "critic": True}
    for name in trains.keys() & shapes.keys():
        (meter.train if trains[name] else meter.score)(shapes[name], batch)


def step_metrics(
    micro_batch: PpoBatch, scores: TokenScores, logprobs: Tensor, policy: PolicyLoss
) -> dict[str, tuple[Tensor, str]]:
    """Metrics of a micro-batch under TRL's names: sums with the names of their denominators."""
    assert scores.entropy is not None
    metrics = {
        "policy/approxkl_avg": (policy.approx_kl, "tokens"),
        "policy/clipfrac_avg": (policy.clipped, "tokens"),
        "policy/entropy_avg": (scores.entropy.detach().sum(), "tokens"),
        "val/ratio": (policy.ratio, "tokens"),
        "val/ratio_square": (policy.ratio_square, "tokens"),
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
    """Train an actor by PPO or one of its relatives, and register it."""
    with open_run("ppo", config, home, **options) as run:
        config = run.config
        parent = find_base(run, config)
        tokenizer = tokenizer_of(parent, config.trust_remote_code, config)
        check_processes(config, run.accelerator.num_processes)
        require_schedule(config, config.updates, offset=WARMUP_OFFSET)
        # 1. Prompts.
        data = StageData(config, run.registry.home, run.log.say)
        prompts, reports = data.training(tokenizer)
        stream, read = stream_data(config, run.registry.home, run.log.say, tokenizer)

        # 2. Actor, critic if there is one, frozen reference (loaded apart from the actor's files), rewards, judge.
        setup, parents = load_setup(run, parent, tokenizer, prompts, stream)
        if run.checkpoint is not None:
            last = run.checkpoint.state["extra"]["last"]
            setup.adapt(last)
            setup.moments = restored(last)
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
            inputs=inputs_of(parents, (*reports, *read)),
            derive=derive,
            warmup_offset=WARMUP_OFFSET,
        )
        with contextlib.closing(setup):
            last = train(run, setup.actor_critic, plan)

        # 4. Register the actor.
        metrics = {"train": last, "health": plan.health, "prompts": len(prompts)}
        if stream:
            metrics["stream_examples"] = len(stream)
        return publish(run, plan, parents=parents, reports=(*reports, *read), metrics=metrics)
