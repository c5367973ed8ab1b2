"""Keys of `rlhf ppo`: policy optimisation against a reward model or reward functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf_pipeline.config.base import (
    Count,
    ModelInput,
    NonNegative,
    Positive,
    Text,
    Warmup,
    no_package,
    option,
)
from rlhf_pipeline.config.lengths import remark_on_halves
from rlhf_pipeline.config.ppo_algorithm import WithAlgorithm, check_algorithm
from rlhf_pipeline.config.ptx import WithStream, check_stream
from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.config.rewards import (
    RATING_PLACES,
    TOKENIZATION,
    RewardFunction,
    RewardFunctions,
    Tokenization,
    check_request,
    check_source,
)
from rlhf_pipeline.config.rollout_engine import COOLEST, HOTTEST, INSTALL, cpp_compiler, vllm_found, vllm_lacks_compiler
from rlhf_pipeline.config.shaping import WithShapedScores
from rlhf_pipeline.config.shorthands import ROLLOUT
from rlhf_pipeline.config.training import COMMON_CHECKS, check_model
from rlhf_pipeline.errors import Fault

WARMUP_OFFSET = 1
"""The warm-up begins at 1 / (steps + 1): an update is a whole rollout, which a learning rate of 0 would waste."""


def _engine(value: Any) -> Any:
    return "native" if value is None else value


def check_rollout_engine(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of `rollout_engine: vllm`: it is not installed, or does not support the config."""
    if config.rollout_engine == "native":
        return
    native = "or rollout_engine: native"
    if not vllm_found():
        yield no_package("rollout_engine", "vllm", "vllm", f"{INSTALL}, {native}")
    elif vllm_lacks_compiler():
        found = f"found 'vllm', but {cpp_compiler()} is not there: vllm compiles a kernel while it samples on a CPU"
        yield Fault("rollout_engine", found, "a C++ compiler", f"install g++ or set CXX, {native}")
    if not COOLEST <= config.temperature <= HOTTEST:
        done = f"would raise to {COOLEST:g}" if config.temperature < COOLEST else "refuses"
        found = f"found {config.temperature:g}, which vllm {done}"
        yield Fault("temperature", found, f"{COOLEST:g} to {HOTTEST:g}", native)


def check_reward(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of a missing reward, of two rewards, or of a critic without its reward model."""
    if config.value_init == "reward_model" and config.reward_model_path is None:
        found = "value_init is reward_model, but there is no reward_model_path"
        yield Fault("value_init", found, "sft or shared, or reward_model_path")
    elif config.value_init == "reward_model" and config.reward_tokenization in ("text", "chat"):
        found = f"value_init is reward_model, but with reward_tokenization {config.reward_tokenization} it reads text"
        yield Fault("value_init", found, "sft or shared: the critic reads the policy's tokens", "set value_init: sft")
    if config.reward_model_path is None and config.reward_functions is None:
        yield Fault("reward_model_path", "missing", "reward_model_path or reward_functions")
    if config.reward_model_path is not None and config.reward_functions is not None:
        yield Fault("reward_functions", "reward_model_path is also given", "one of the two", "remove one")
    if config.reward_combination != "sum" and len(config.reward_functions or ()) < 2:
        found = f"found {config.reward_combination!r} with fewer than two rewards"
        yield Fault("reward_combination", found, "two or more reward_functions", "or reward_combination: sum")


def check_reward_sources(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of reward sources that do not fit their key."""
    path = config.reward_model_path
    if path is not None and (path == "world" or ":" in path):
        fix = f"write reward_functions: [{{source: {path}}}]"
        yield Fault("reward_model_path", f"{path!r} is not a reward model", "name, directory or hub id", fix)
    for index, entry in enumerate(config.reward_functions or ()):
        yield from check_source(f"reward_functions.{index}.source", entry.source, entry.llm_judge)
        yield from check_request(f"reward_functions.{index}.llm_judge", entry.llm_judge, RATING_PLACES)


def check_judge(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of a judge that is not a reward source, or that the policy is trained on."""
    if config.judge is None:
        return
    yield from check_source("judge", config.judge, None)
    if config.judge in [reward.source for reward in config.rewards]:
        found = f"{config.judge!r} is the reward that the policy is trained on"
        fix = "train a reward model on other pairs (rlhf train-rm dataset_train_split=judge), or remove judge"
        yield Fault("judge", found, "a held-out reward model, module:function or world", fix)


def check_freezing(config: PpoConfig) -> Iterator[Fault]:
    """Yield the fault of frozen layers of weights that are all frozen."""
    if config.freeze_layers and config.use_peft:
        found = f"found {config.freeze_layers} with use_peft, which freezes all weights below the adapter"
        yield Fault("freeze_layers", found, "0", "remove it, or set use_peft: false")


def check_episodes(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of a run whose length is unknown, or shorter than one rollout."""
    if config.total_episodes is None:
        if config.max_steps == -1:
            expected = "the number of sampled responses in the run (or max_steps, in updates)"
            yield Fault("total_episodes", "missing", expected)
    elif config.total_episodes < config.rollout_batch_size:
        found = f"{config.total_episodes} episodes do not fill one rollout of {config.rollout_batch_size}"
        yield Fault("total_episodes", found, "total_episodes >= rollout_batch_size")


def remark_on_episodes(config: PpoConfig) -> Iterator[str]:
    """Yield a note if the rollouts of a run do not add up to its episodes."""
    size, updates = config.rollout_batch_size, config.updates
    if config.max_steps < 1 and (config.total_episodes or 0) % size:
        counted = f"{updates} update{'s' if updates > 1 else ''} of {size} episodes"
        yield f"total_episodes {config.total_episodes} is not a multiple of rollout_batch_size {size}: {counted}"


def remark_on_dropout(config: PpoConfig) -> Iterator[str]:
    """Yield a note if the adapter is to be trained with dropout."""
    if config.use_peft and config.lora_dropout:
        why = "the ratio of PPO compares two passes, which would drop different inputs"
        yield f"lora_dropout {config.lora_dropout:g} is not used: {why}"


def check_epochs(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of keys that PPO does not use: passes over the data, their ends, and evaluation."""
    if config.num_train_epochs != 1:
        found = f"found {config.num_train_epochs:g}, but ppo counts episodes"
        yield Fault("num_train_epochs", found, "total_episodes, or max_steps in updates", "remove it")
    if config.eval_strategy != "no":
        found = f"found {config.eval_strategy!r}, but every update of ppo already measures fresh samples"
        yield Fault("eval_strategy", found, "'no'", "remove eval_strategy and eval_steps")
    if config.save_strategy == "epoch":
        yield Fault("save_strategy", "found 'epoch', but ppo counts updates", "'steps' or 'no'", "set save_steps")


def check_batches(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of batch sizes that do not divide each other."""
    rollout, parts = config.rollout_batch_size, config.num_mini_batches
    micro, group = config.per_device_train_batch_size, config.num_generations
    if config.kl_horizon is not None and config.kl_horizon < rollout:
        yield Fault("kl_horizon", f"found {config.kl_horizon}", f"rollout_batch_size, {rollout}, or more")
    if config.kl_target is not None and not config.kl_coef:
        yield Fault("kl_coef", "found 0 with kl_target, which multiplies it", "a number > 0 to start with")
    if rollout % group:
        found = f"rollout_batch_size {rollout} is not a multiple of num_generations {group}"
        yield Fault("num_generations", found, "a divisor of rollout_batch_size")
    if rollout % parts:
        found = f"rollout_batch_size {rollout} is not a multiple of num_mini_batches {parts}"
        yield Fault("num_mini_batches", found, "a divisor of rollout_batch_size")
        return
    minibatch = rollout // parts
    if minibatch % micro:
        found = f"a minibatch of {minibatch} (rollout_batch_size {rollout} / num_mini_batches {parts})"
        found += f" is not a multiple of per_device_train_batch_size {micro}"
        divisors = [str(n) for n in range(1, min(minibatch, 64) + 1) if minibatch % n == 0]
        yield Fault("per_device_train_batch_size", found, f"one of {', '.join(divisors)}")
        return
    given, follows = config.gradient_accumulation_steps, minibatch // micro
    if given not in (None, follows):
        found = f"found {given}, but a minibatch of {minibatch} is {follows} micro-batches of {micro}"
        yield Fault("gradient_accumulation_steps", found, str(follows), "remove it: it is computed")


def check_warmups(config: PpoConfig) -> Iterator[Fault]:
    """Yield the faults of warm-ups that are longer than the run."""
    if config.max_steps != -1:
        updates, limit = config.max_steps, "max_steps"
    else:
        updates, limit = config.updates, "total_episodes / rollout_batch_size"
        if 1 <= updates < config.warmup_steps:
            found = f"warm-up of {config.warmup_steps} updates in a run of {updates}"
            yield Fault("warmup_steps", found, f"at most {limit}")
    if 1 <= updates <= (config.critic_warmup_steps or 0):
        found = f"the actor is frozen for {config.critic_warmup_steps} updates in a run of {updates}"
        yield Fault("critic_warmup_steps", found, f"less than {limit}")


class PpoConfig(WithAlgorithm, WithShapedScores, WithStream):
    """Config of `rlhf ppo`; steps are updates, one rollout each."""

    stage: ClassVar[str] = "ppo"
    checks: ClassVar = (
        check_model,
        *COMMON_CHECKS,
        check_algorithm,
        check_stream,
        check_reward,
        check_reward_sources,
        check_judge,
        check_rollout_engine,
        check_freezing,
        check_episodes,
        check_epochs,
        check_batches,
        check_warmups,
    )
    remarks: ClassVar = (remark_on_episodes, remark_on_dropout, remark_on_halves)
    samples: ClassVar[bool] = True

    learning_rate: Positive = option(3e-6, "peak learning rate of AdamW (N+ implementation details)")
    adam_epsilon: Positive = option(1e-5, "constant added to AdamW's denominator (N+ implementation details)")
    warmup_steps: Warmup = option(
        0,
        "updates of linear warm-up: update u = 1, 2, ... of w has u / (w + 1) of the rate, so the first update trains "
        "(ours; TRL: rate 0 for the first rollout); below 1: a fraction of all updates, rounded up",
    )
    gradient_accumulation_steps: Count | None = option(
        None, "micro-batches per optimizer step; computed from the minibatch and the micro-batch"
    )
    max_steps: int = option(-1, "number of updates, overrides total_episodes; -1: count episodes (TRL)")

    reward_model_path: Text | None = option(None, "reward model: registry name, directory or hub id", names="reward")
    reward_functions: RewardFunctions = option(
        None,
        "rewards to combine, instead of reward_model_path: list of {source, weight}; a function has the signature of "
        "TRL's GRPO trainer, gets every column of the row, and may be async or return None (not applicable)",
        names="reward",
        min_length=1,
    )
    reward_tokenization: Tokenization = TOKENIZATION
    reward_combination: Literal["sum", "min", "mean_minus_std"] = option(
        "sum",
        "how several reward_functions make one reward, from their scores times their weights: sum (TRL), min, or "
        "mean_minus_std: their mean minus their standard deviation (reward model ensembles, Coste et al. 2024); the "
        "optimum is then that of the combined reward",
        moves_optimum=True,
    )
    judge: Text | None = option(
        None,
        "held-out scorer that watches the run: a reward model, module:function or world; it scores the rollouts every "
        "logging_steps updates, is logged as objective/judge, and nothing is trained on it (ours: none)",
        names="reward",
    )
    total_episodes: Count | None = option(None, "responses to sample in the whole run; required without max_steps")
    rollout_batch_size: Count = option(ROLLOUT, "responses sampled per update, on all devices together (ours)")
    kl_coef: NonNegative = option(
        0.05, "beta: penalty per nat of KL to the reference, in units of reward (TRL)", moves_optimum=True, moving=0.0
    )
    temperature: Positive = option(
        1.0,
        "divides the logits of sampler, policy and reference (ours; TRL: .7); the registered model is read at "
        "temperature 1 and is then DPO's at beta = kl_coef / temperature (exact for responses of one token)",
        moves_optimum=True,
    )
    rollout_engine: Annotated[Literal["native", "vllm"], BeforeValidator(_engine)] = option(
        "native",
        "sampler of the responses (ours: the model itself); vllm: vLLM in the same process, with the weights of each "
        "update; run on a CPU, never on a GPU",
    )
    importance_weight_cap: Positive = option(
        2.0,
        "with vllm: cap of a token's importance weight min(pi_old / pi_sampler, cap) in the policy loss (Yao et al. "
        "2025; TRL's cap: 3)",
    )
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = option(
        0.3,
        "with vllm: share of the memory of its GPU (without one: of the machine) for vLLM's weights and cache (TRL)",
    )
    freeze_layers: int = option(
        0, "number of the actor's first layers that stay as they are, with its embeddings (ours: none)", ge=0
    )
    shared_base: bool = option(
        False,
        "with use_peft: hold actor, reference, critic and reward model as adapters on one copy of the weights; the "
        "reward model must be an adapter on the weights of model_name_or_path (ours: off)",
    )

    @model_validator(mode="after")
    def _fill_what_follows(self) -> PpoConfig:
        if self.value_init is None and self.has_critic:
            unreadable = self.reward_model_path is None or self.reward_tokenization in ("text", "chat")
            object.__setattr__(self, "value_init", "sft" if unreadable else "reward_model")
        if self.gradient_accumulation_steps is None:
            steps = self.minibatch_size // self.per_device_train_batch_size
            object.__setattr__(self, "gradient_accumulation_steps", max(1, steps))
        return self

    @property
    def reads_prompts(self) -> bool:
        """Whether the stage reads only prompts from its data."""
        return True

    def parents(self) -> dict[str, ModelInput]:
        """Return the models that the policy comes from, by role.

        These are its start, which is also the reference, its reward models in order, and the judge if it is a model.
        """
        found = super().parents()
        found["reference"] = found["base"]
        models = [reward.source for reward in self.rewards if names_a_model(reward.source)]
        for number, source in enumerate(models, start=1):
            found["reward_model" if number == 1 else f"reward_model_{number}"] = ModelInput(source, "reward_model")
        if self.judge is not None and names_a_model(self.judge):
            found["judge"] = ModelInput(self.judge, "reward_model")
        return found

    @property
    def minibatch_size(self) -> int:
        """The number of responses in one optimizer step, on all devices together."""
        return self.rollout_batch_size // self.num_mini_batches

    @property
    def stream_batch_size(self) -> int:
        """The number of examples of the pretraining stream in one optimizer step, on all devices together."""
        return self.ptx_batch_size or self.minibatch_size

    def stream_steps(self, updates: int) -> int:
        """Return how many optimizer steps of the first updates read the stream: all that train the actor."""
        return max(0, updates - (self.critic_warmup_steps or 0)) * self.num_ppo_epochs * self.num_mini_batches

    @property
    def prompts_per_rollout(self) -> int:
        """The number of prompts of a rollout, on all devices together."""
        return self.rollout_batch_size // self.num_generations

    def responses_per_tree(self, processes: int = 1) -> int:
        """The number of responses to a prompt that share it in every pass of training, whatever their lengths."""
        if self.micro_batch_tokens is not None:
            return 1
        return math.gcd(self.num_generations, self.per_device_train_batch_size, self.minibatch_size // processes)

    @property
    def updates(self) -> int:
        """The number of updates in the run, one rollout each."""
        return self.max_steps if self.max_steps > 0 else (self.total_episodes or 0) // self.rollout_batch_size

    @property
    def rewards(self) -> tuple[RewardFunction, ...]:
        """The terms of the reward: those of reward_functions, or the reward model with weight 1."""
        if self.reward_functions is not None:
            return self.reward_functions
        return (RewardFunction(source=self.reward_model_path),) if self.reward_model_path else ()
