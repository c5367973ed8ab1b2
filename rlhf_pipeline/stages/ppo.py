"""PPO: actor, frozen reference, critic and reward, with the KL to the reference in the reward."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_pipeline.algorithms.policy import clipped_policy_loss, clipped_value_loss
from rlhf_pipeline.config.base import moves_optimum
from rlhf_pipeline.data.tokenizers import text_of
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.models.actor_critic import describe_critic, make_actor_critic
from rlhf_pipeline.models.loading import save_model
from rlhf_pipeline.models.roles import ActorCritic, assert_independent
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.vllm_engine import VllmEngine
from rlhf_pipeline.stages.common import (
    StageResult,
    find_model,
    inputs_of,
    load_policy,
    publish,
    tokenizer_of,
    with_lengths,
)
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.stages.gate import repeat_gates
from rlhf_pipeline.stages.judge import load_judge
from rlhf_pipeline.stages.rewards import LoadedModel, LoadedReward, load_reward, weighted
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.ppo_windows import PpoBatch, PpoSettings, RolloutCollector
from rlhf_pipeline.training.precision import uses_bf16
from rlhf_pipeline.training.ranks import together
from rlhf_pipeline.training.run import Run, open_run
from rlhf_pipeline.training.session import Metrics, Plan, train
from rlhf_pipeline.training.windows import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ppo_step(
    model: ActorCritic,
    micro_batch: PpoBatch,
    *,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
    loss_normalization: str,
    meter: CostMeter,
    shapes: dict[str, ModelShape],
) -> Loss:
    """Clipped policy loss and clipped value loss of a micro-batch; denominator: tokens, or sequences x R."""
    batch, mask = micro_batch.batch, micro_batch.mask
    scores = model(batch)
    meter.tokens_trained += batch.active_tokens
    trains = {"actor": scores.logprobs.requires_grad, "critic": True}  # the actor does not while the critic warms up
    for name in trains.keys() & shapes.keys():
        (meter.train if trains[name] else meter.score)(shapes[name], batch)
    width = mask.shape[1]
    logprobs, values = batch.padded(scores.logprobs, width), batch.padded(scores.values, width)
    old, advantages, weights = micro_batch.old_logprobs, micro_batch.advantages, micro_batch.weights
    policy = clipped_policy_loss(logprobs, old, advantages, mask, cliprange=cliprange, weights=weights)
    value_loss, value_clipped = clipped_value_loss(
        values, micro_batch.old_values, micro_batch.returns, mask, cliprange_value=cliprange_value
    )
    terms = {"loss/value_avg": (value_loss, loss_normalization, vf_coef)}
    # While the critic warms up the actor's graph is cut, so its loss is reported and trains nothing.
    terms["loss/policy_avg"] = (policy.loss, loss_normalization, 1.0)
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
            distance = torch.where(mask, (logprobs - old).exp() - 1, 0.0).abs().max()
        metrics["first_minibatch/ratio_error"] = (distance * micro_batch.share, "first_batches")
        metrics["first_minibatch/clipfrac"] = (policy.clipped, "first_tokens")
    return Loss(terms, metrics, {"log-probabilities of the policy": scores.logprobs, "values": scores.values})


def derive(metrics: Metrics) -> Metrics:
    """Turn E[ratio^2] into the variance of the ratio."""
    metrics = dict(metrics)
    square = metrics.pop("val/ratio_square", 0.0)
    metrics["val/ratio_var"] = max(square - metrics.get("val/ratio", 0.0) ** 2, 0.0)
    return metrics


def stop_id_of(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a response.

    Raises:
        ConfigError: when `stop_token` is not one token of the tokenizer.
    """
    if config.stop_token is None:
        return tokenizer.eos_token_id
    found = tokenizer.get_vocab().get(config.stop_token)
    if found is None:
        raise ConfigError(Fault("stop_token", f"{config.stop_token!r} is not a token of the policy's tokenizer"))
    return found


def settings_of(config: Any, tokenizer: PreTrainedTokenizerBase, ranks: int) -> PpoSettings:
    """What a config says about rollouts, per rank.

    Raises:
        ConfigError: when the ranks do not divide the minibatch, or vLLM is to sample for several.
    """
    if config.rollout_engine == "vllm" and ranks > 1:
        found = f"found 'vllm' on {ranks} processes"
        raise ConfigError(Fault("rollout_engine", found, "one process", "or rollout_engine: native"))
    if config.minibatch_size % ranks:
        found = f"a minibatch of {config.minibatch_size} responses on {ranks} processes"
        raise ConfigError(Fault("rollout_batch_size", found, f"a minibatch that {ranks} divides"))
    return PpoSettings(
        rollout_size=config.rollout_batch_size // ranks,
        num_ppo_epochs=config.num_ppo_epochs,
        num_mini_batches=config.num_mini_batches,
        micro_batch=(config.per_device_train_batch_size, config.micro_batch_tokens),
        response_length=config.lengths().response,
        temperature=config.temperature,
        kl_coef=config.kl_coef,
        gamma=config.gamma,
        lam=config.lam,
        whiten_advantages=config.whiten_advantages,
        whiten_rewards=config.whiten_rewards,
        missing_eos_penalty=config.missing_eos_penalty,
        critic_warmup_steps=config.critic_warmup_steps,
        seed=config.seed,
        stop_id=stop_id_of(config, tokenizer),
        pad_id=tokenizer.pad_token_id,
        importance_weight_cap=config.importance_weight_cap,
    )


def load_rewards(run: Run, policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[float, LoadedReward]]:
    """All reward sources of the config with their weights."""
    config = run.config
    return [
        (part.weight, load_reward(run.registry, part.source, config, policy, tokenizer, run.device))
        for part in config.rewards
    ]


def load_engine(run: Run, policy: Resolved, model: torch.nn.Module) -> VllmEngine | None:
    """The engine that samples in the place of the model; None for the native sampler."""
    config = run.config
    if config.rollout_engine == "native":
        return None
    dtype = torch.bfloat16 if uses_bf16(config) else next(model.parameters()).dtype
    engine = VllmEngine(
        policy.location,
        dtype=str(dtype).removeprefix("torch."),
        max_length=config.lengths().total,
        memory=config.vllm_gpu_memory_utilization,
        seed=config.seed,
        revision=policy.revision,
        trust_remote_code=config.trust_remote_code,
    )
    capped = f"importance weights up to {config.importance_weight_cap:g}"
    run.log.say(f"rollouts by vllm {engine.version} in {dtype}, {capped}; untried so far with vllm itself")
    return engine


def say_moved(run: Run) -> dict[str, Any]:
    """Name the options that move the optimum away from pi_ref exp(r / beta)."""
    moved = moves_optimum(run.config)
    if moved:
        listed = ", ".join(f"{key}={value}" for key, value in moved.items())
        run.log.say(f"these options move the optimum away from that of DPO at the same beta: {listed}")
    return moved


def run_ppo(config: Any, home: Path, **options) -> StageResult:
    """Train an actor-critic by PPO and register the actor."""
    with open_run("ppo", config, home, **options) as run:
        # 1. Actor, frozen reference (another load of the same files), reward, critic.
        parent = find_model(
            run.registry, config.model_name_or_path, "policy", revision=config.model_revision, say=run.log.say
        )
        config = run.settle(with_lengths(config, parent, run.log.say))
        tokenizer = tokenizer_of(parent, config.trust_remote_code)
        settings = settings_of(config, tokenizer, run.accelerator.num_processes)
        rewards = load_rewards(run, parent, tokenizer)
        options_ = {"temperature": config.temperature}
        actor = load_policy(parent, config, tokenizer, run.device, **options_)
        reference = load_policy(parent, config, tokenizer, run.device, frozen=True, **options_)
        models = [loaded for _, loaded in rewards if isinstance(loaded, LoadedModel)]
        repeat_gates([loaded.resolved for loaded in models], run.log.say)
        model = make_actor_critic(
            actor.model,
            actor.reader,
            config.value_init,
            reward_model=models[0].model if models else None,
            temperature=config.temperature,
        ).to(run.device)
        assert_independent(model, reference)
        for loaded in models:
            assert_independent(model, loaded.model)
        run.log.say(describe_critic(config.value_init, models[0].source.label if models else None))
        judge, judge_model = load_judge(run, [loaded for _, loaded in rewards], parent, tokenizer)
        reward = weighted(rewards)
        run.log.say(f"reward: {reward.label}; KL to {parent.label} at beta {config.kl_coef:g}")
        moved = say_moved(run)

        # 2. Prompts.
        data = StageData(config, run.registry.home, run.log.say)
        prompts, reports = data.split("prompt", config.dataset_train_split, tokenizer, limit=config.max_train_samples)

        # 3. Train.
        parents = {"base": parent, "reference": parent}
        trained = {"checkpointed": config.gradient_checkpointing}
        shapes = {"actor": ModelShape.of(actor.model, **trained), "reference": ModelShape.of(reference.model)}
        if model.critic is not None:
            shapes["critic"] = ModelShape.of(model.critic, head=False, **trained)
        for number, loaded in enumerate(models):
            role = "reward_model" if number == 0 else f"reward_model_{number + 1}"
            parents[role] = loaded.resolved
            shapes[role] = ModelShape.of(loaded.model.model, head=False)
        if judge_model is not None:
            parents["judge"] = judge_model
        accelerator = run.accelerator
        engine = load_engine(run, parent, actor.model)
        collector = RolloutCollector(
            settings,
            model,
            reference,
            reward,
            prompts,
            run.meter,
            shapes,
            reduce=lambda sums: accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums,
            autocast=accelerator.autocast,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=run.device,
            judge=judge,
            engine=engine,
            memory=run.memory,
            together=functools.partial(together, accelerator, run.memory),
        )
        step = functools.partial(
            ppo_step,
            cliprange=config.cliprange,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            loss_normalization=config.loss_normalization,
            meter=run.meter,
            shapes=shapes,
        )
        plan = Plan(
            lambda prepared, start: collector.windows(prepared, start, config.updates),
            step,
            config.updates,
            shown=(
                "objective/scores",
                "objective/judge",
                "objective/kl",
                "objective/rlhf_reward",
                "val/ended",
                "val/explained_variance",
            ),
            derive=derive,
            inputs=inputs_of(parents, reports),
            save=lambda directory: save_model(model.actor, tokenizer, directory),
            decode=functools.partial(text_of, tokenizer),
        )
        last = train(run, model, plan)

        # 4. Register the actor.
        metrics = {"train": last, "health": plan.health, "prompts": len(prompts), "moved_optimum": moved}
        return publish(run, model.actor, tokenizer, parents=parents, reports=reports, metrics=metrics)
