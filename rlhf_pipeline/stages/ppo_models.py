"""Load, check and log the models of a PPO run, and put them together with its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import stop_ids
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.models.adapters import add_adapter
from rlhf_pipeline.models.four_bits import entries
from rlhf_pipeline.models.freezing import freeze_layers
from rlhf_pipeline.models.modules import ActorCritic, assert_independent, describe_critic, make_actor_critic
from rlhf_pipeline.registry.adapters import chain_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.rewards import CombinedReward
from rlhf_pipeline.rollout.vllm_engine import VllmEngine
from rlhf_pipeline.stages.gate import repeat_gates, warn_of_cut_responses
from rlhf_pipeline.stages.reward_sources import load_judge, load_reward, refused_critic
from rlhf_pipeline.stages.starts import load_policy_and_reference
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.ppo_rollouts import PpoSetup
from rlhf_pipeline.training.precision import uses_bf16
from rlhf_pipeline.training.ranks import together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_setup(
    run: Run[PpoConfig],
    parent: Resolved,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    stream: Sequence[Example] = (),
) -> tuple[PpoSetup, dict[str, Resolved]]:
    """Load actor, frozen reference, rewards, critic and judge.

    With `use_peft` actor and critic are adapters, on the weights of the reference and of the reward model. With
    `shared_base` all four are adapters on one copy of the weights.

    Returns:
        the setup of the run, and the parents for its manifest, by role.

    Raises:
        MismatchError: models that do not fit together; see `load_reward` and `load_judge`.
    """
    config, accelerator = run.config, run.accelerator
    temperature, place = config.temperature, run.loads_on
    actor, reference = load_policy_and_reference(parent, config, tokenizer, place, temperature=temperature)
    below = reference.model if config.shared_base else None
    rewards = [
        load_reward(
            run.registry,
            part.source,
            config,
            parent,
            tokenizer,
            run.device,
            below,
            loads_on=run.loads_on,
            llm_judge=part.llm_judge,
            say=run.log.say,
            bill=run.meter.count,
        )
        for part in config.rewards
    ]
    models = [loaded.model for loaded in rewards if loaded.model is not None]
    named = [loaded.resolved for loaded in rewards if loaded.resolved is not None]
    if config.value_init == "reward_model" and not models:
        raise refused_critic(named[0])
    repeat_gates(named, run.log.say)
    if not config.missing_eos_penalty:
        warn_of_cut_responses(named, run.log.say)
    actor_critic = make_actor_critic(
        actor.model,
        actor.reader,
        config.value_init,
        reward_model=models[0] if models else None,
        start=reference.model,
        adapt=partial(add_adapter, config=config, base=parent.label) if config.use_peft else None,
        temperature=config.temperature,
    ).to(run.loads_on)
    actor_critic.trains_entropy = config.entropy_coef > 0
    if config.freeze_layers:
        freeze_layers(actor_critic.actor, config.freeze_layers)
        run.log.say(describe_weights(actor_critic, reference))
    for frozen in (reference, *models):
        assert_independent(actor_critic, frozen)
    run.log.say(describe_critic(config.value_init, named[0].label if models else None))
    if config.use_peft:
        run.log.say(describe_weights(actor_critic, reference, *models))
    judge, judge_model = load_judge(run, rewards, parent, tokenizer)
    weights = [part.weight for part in config.rewards]
    parts = tuple(zip(weights, (loaded.source for loaded in rewards), strict=True))
    reward = CombinedReward(parts, config.reward_combination, run.log.say)
    run.log.say(f"reward: {reward.label}; KL to {parent.label} at beta {config.kl_coef:g}")

    parents = {"base": parent, "reference": parent}
    trained = {"checkpointed": config.gradient_checkpointing}
    shapes = {"actor": ModelShape.of(actor.model, **trained), "reference": ModelShape.of(reference.model)}
    if actor_critic.critic is not None:
        shapes["critic"] = ModelShape.of(actor_critic.critic, head=False, **trained)
    roles = [role for role in config.parents() if role.startswith("reward_model")]
    parents |= dict(zip(roles, named, strict=True))
    with_model = (loaded for loaded in rewards if loaded.resolved is not None)
    for role, loaded in zip(roles, with_model, strict=True):
        if loaded.model is not None:
            shapes[role] = ModelShape.of(loaded.model.model, head=False)
    if judge_model is not None:
        parents["judge"] = judge_model
    engine = load_engine(run, config, parent, actor_critic)
    # A model may be the reward of several parts. Judges and reward models that read text stay whole.
    run.placed(actor_critic, reference, *{id(model): model for model in models}.values())
    setup = PpoSetup(
        config,
        actor_critic,
        reference,
        reward,
        prompts,
        stop_ids=stop_ids(tokenizer),
        meter=run.meter,
        shapes=shapes,
        engine=engine,
        judge=judge,
        stream=stream,
        memory=run.memory,
        device=run.device,
        autocast=accelerator.autocast,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        reduce=lambda sums: accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums,
        together=partial(together, accelerator, run.memory),
    )
    return setup, parents


def describe_weights(actor_critic: ActorCritic, *frozen: torch.nn.Module) -> str:
    """One line for the log: how many weights are trained, and how many are in memory once."""
    held = {p.data_ptr(): entries(p) for module in (actor_critic, *frozen) for p in module.parameters()}
    trained = sum(p.numel() for p in actor_critic.parameters() if p.requires_grad)
    return f"weights: {trained:,} are trained, of {sum(held.values()):,} in memory for all models"


def check_processes(config: PpoConfig, count: int) -> None:
    """Check that `count` processes can share a run.

    Raises:
        ConfigError: `count` does not divide the minibatch or the prompts of a rollout, or `rollout_engine: vllm` has
            several processes.
    """
    if config.rollout_engine == "vllm" and count > 1:
        found = f"found 'vllm' on {count} processes"
        raise ConfigError(Fault("rollout_engine", found, "one process", "or rollout_engine: native"))
    if config.minibatch_size % count:
        found = f"a minibatch of {config.minibatch_size} responses on {count} processes"
        raise ConfigError(Fault("rollout_batch_size", found, f"a minibatch that {count} divides"))
    if config.prompts_per_rollout % count:
        found = (
            f"{config.prompts_per_rollout} prompts with {config.num_generations} responses each on {count} processes"
        )
        expected = f"rollout_batch_size / num_generations that {count} divides: a prompt's responses stay together"
        raise ConfigError(Fault("num_generations", found, expected))


def load_engine(run: Run[PpoConfig], config: PpoConfig, start: Resolved, policy: ActorCritic) -> VllmEngine | None:
    """The engine that samples instead of the policy, which comes from `start`; None for the native sampler."""
    if config.rollout_engine == "native":
        return None
    dtype = torch.bfloat16 if uses_bf16(config) else next(policy.actor.parameters()).dtype
    whole, _ = chain_of(start)
    engine = VllmEngine(
        policy,
        whole.location,
        dtype=str(dtype).removeprefix("torch."),
        max_length=config.lengths().total,
        memory=config.vllm_gpu_memory_utilization,
        seed=config.seed,
        revision=whole.revision,
        trust_remote_code=config.trust_remote_code,
    )
    capped = f"importance weights up to {config.importance_weight_cap:g}"
    run.log.say(f"rollouts by vllm {engine.version} in {dtype}, {capped}")
    return engine
