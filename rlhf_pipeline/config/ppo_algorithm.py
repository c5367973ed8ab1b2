"""The algorithm of `rlhf ppo` and its keys: PPO, and its relatives on the same rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import model_validator

from rlhf_pipeline.config.base import Count, Fraction, Keys, NonNegative, Positive, option
from rlhf_pipeline.errors import Fault

Algorithm = Literal["ppo", "a2c", "rloo", "grpo"]
CRITICS: tuple[Algorithm, ...] = ("ppo", "a2c")
"""Algorithms whose baseline is a critic; the others compare the responses to one prompt."""

_USERS: Mapping[str, tuple[Algorithm, ...]] = {
    **dict.fromkeys(("value_init", "vf_coef", "gamma", "lam", "whiten_rewards", "critic_warmup_steps"), CRITICS),
    "cliprange_value": ("ppo",),
    "cliprange": ("ppo", "rloo", "grpo"),
    "kl_in": ("rloo", "grpo"),
    "scale_rewards": ("grpo",),
}
"""Options that only these algorithms use; with the others they are null."""
_ONCE = ("num_ppo_epochs", "num_mini_batches")
"""Options that are 1 with a2c."""
_DEFAULTS: Mapping[Algorithm, Mapping[str, Any]] = {
    "ppo": {},
    "a2c": dict.fromkeys(_ONCE, 1),
    "rloo": {"num_generations": 2, "whiten_advantages": False},
    "grpo": {"num_generations": 8, "whiten_advantages": False},
}
"""Defaults that differ from those of PPO."""
HORIZON = 10_000
"""The default of kl_horizon."""
KL_PLACES: Mapping[str, tuple[Algorithm, ...]] = {
    "reward": ("rloo", "grpo"),
    "loss": ("grpo",),
    "response_loss": ("rloo",),
}
"""The values of kl_in, and the algorithms that have them."""
_UNLESS_IN_LOSS = ("kl_in", ("reward", "response_loss"))


class WithAlgorithm(Keys):
    """A config with the algorithm and its options; an option that the algorithm does not use is None."""

    algorithm: Algorithm = option(
        "ppo",
        "ppo: clipped steps against a critic (PPO paper); a2c: the same in one epoch with one minibatch, so nothing "
        "is clipped (Huang et al. 2022); rloo: no critic, a response's return minus the mean return of the others to "
        "its prompt (Ahmadian et al. 2024); grpo: no critic, minus the mean return of all responses to its prompt "
        "(Shao et al. 2024). All have the same optimum with their defaults",
    )
    num_generations: Count = option(
        1,
        "responses to each prompt of a rollout, which has rollout_batch_size / num_generations prompts (ppo, a2c: 1; "
        "TRL: rloo 2, grpo 8)",
        moves_optimum=True,
        unless=_UNLESS_IN_LOSS,
    )
    num_ppo_epochs: Count = option(4, "passes over each rollout (TRL); a2c: 1")
    num_mini_batches: Count = option(
        4, "minibatches per epoch: optimizer steps in one pass over a rollout (PPO's code; TRL: 1); a2c: 1"
    )
    cliprange: Positive | None = option(
        0.2, "clip range of the probability ratio: 1 - cliprange to 1 + cliprange (PPO paper); a2c: none"
    )
    cliprange_value: Positive | None = option(0.2, "with ppo: clip range of a value's change, in units of reward (TRL)")
    value_init: Literal["reward_model", "sft", "shared"] | None = option(
        None,
        "with ppo and a2c: initial critic (InstructGPT: reward_model; sft without a reward model); shared: a value "
        "head on the actor",
    )
    vf_coef: NonNegative | None = option(
        0.1,
        "with ppo and a2c: weight of the value loss (TRL)",
        moves_optimum=True,
        moving=0.0,
        unless=("lam", 1.0),
    )
    gamma: Fraction | None = option(1.0, "with ppo and a2c: discount per token (TRL)", moves_optimum=True)
    lam: Fraction | None = option(
        0.95,
        "with ppo and a2c: lambda of GAE: 1 is unbiased; less reduces the variance and discounts what the critic "
        "misses (TRL)",
        moves_optimum=True,
        neutral=1.0,
        condition="with a wrong critic",
    )
    critic_warmup_steps: int | None = option(
        0, "with ppo and a2c: number of first updates that train only the critic (TRL: none)", ge=0
    )
    whiten_advantages: bool = option(
        True,
        "normalise advantages to mean 0 and variance 1 over the rollout: of tokens with ppo and a2c (TRL: true), of "
        "responses with rloo and grpo (there TRL and the default here: false)",
    )
    whiten_rewards: bool | None = option(
        False, "with ppo and a2c: scale the rewards per token to variance 1 (TRL: off)", moves_optimum=True
    )
    kl_in: Literal["reward", "loss", "response_loss"] | None = option(
        "reward",
        "with rloo and grpo: where the penalty of the KL is. reward: the log-ratio in the return, as in the other "
        "algorithms (TRL's RLOO); loss, with grpo: the k3 estimate of each token (GRPO paper), whose optimum depends "
        "on num_generations; response_loss, with rloo: half the square of a response's log-ratio (k2), same optimum",
        moves_optimum=True,
        neutral=("reward", "response_loss"),
    )
    entropy_coef: NonNegative = option(
        0.0, "weight of a bonus for the entropy of each token's distribution, in nats (TRL: 0)", moves_optimum=True
    )
    kl_target: Positive | None = option(
        None,
        "KL to the reference in nats that an adaptive kl_coef aims at (Ziegler et al. 2019); the optimum is that of "
        "the kl_coef at which it ends, and a target that no better policy has drives it to 0 (ours: none)",
        moves_optimum=True,
    )
    kl_horizon: Count | None = option(
        None, "with kl_target: episodes over which kl_coef changes by up to its fifth (Ziegler et al. 2019: 10,000)"
    )
    scale_rewards: Literal["none", "group"] | None = option(
        "none",
        "with grpo: divide the advantages by the standard deviation of the returns to their prompt plus 1e-4: none "
        "(ours), or group (GRPO paper)",
        moves_optimum=True,
        unless=_UNLESS_IN_LOSS,
    )
    loss_normalization: Literal["tokens", "sequences", "responses"] = option(
        "tokens",
        "divide the loss by the number of tokens (TRL), or by sequences x response_length (unbiased); responses, with "
        "grpo: mean over responses of the means over their tokens (GRPO paper)",
        moves_optimum=True,
        neutral=("tokens", "sequences"),
        unless=_UNLESS_IN_LOSS,
    )

    @model_validator(mode="after")
    def _fill_of_the_algorithm(self) -> WithAlgorithm:
        """Give each option that is not given the value of the algorithm; None if the algorithm does not use it."""
        for name, users in _USERS.items():
            if getattr(self, name) is None or name not in self.model_fields_set:
                default = type(self).model_fields[name].default if self.algorithm in users else None
                object.__setattr__(self, name, default)
        for name, default in _DEFAULTS[self.algorithm].items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, default)
        if self.kl_target is not None and self.kl_horizon is None:
            object.__setattr__(self, "kl_horizon", HORIZON)
        return self

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return self.algorithm in CRITICS

    @property
    def separate_critic(self) -> bool:
        """Whether there is a critic with a trunk of its own."""
        return self.value_init in ("reward_model", "sft")


def check_algorithm(config: WithAlgorithm) -> Iterator[Fault]:
    """Yield the faults of options that the algorithm does not use, and of groups that are too small for it."""
    name = config.algorithm
    for key, users in _USERS.items():
        value = getattr(config, key)
        if name not in users and value is not None:
            found = f"found {value!r} with algorithm {name}, which does not use it"
            yield Fault(key, found, f"no {key}", f"remove it, or set algorithm: {' or '.join(users)}")
    for key in _ONCE:
        value = getattr(config, key)
        if name == "a2c" and value != 1:
            found = f"found {value} with algorithm a2c, which takes one step on a rollout"
            yield Fault(key, found, "1", "remove it, or set algorithm: ppo")
    if name not in CRITICS and config.num_generations < 2:
        found = f"found {config.num_generations} with algorithm {name}, which compares the responses to one prompt"
        yield Fault("num_generations", found, "2 or more")
    if name != "grpo" and config.loss_normalization == "responses":
        found = f"found 'responses' with algorithm {name}"
        yield Fault("loss_normalization", found, "tokens or sequences", "or set algorithm: grpo")
    if config.kl_horizon is not None and config.kl_target is None:
        yield Fault("kl_horizon", f"found {config.kl_horizon} without kl_target", "kl_target", "or remove it")
    if config.kl_in is not None and name in _USERS["kl_in"] and name not in KL_PLACES[config.kl_in]:
        found, others = f"found {config.kl_in!r} with algorithm {name}", " or ".join(KL_PLACES[config.kl_in])
        yield Fault("kl_in", found, "reward", f"remove it, or set algorithm: {others}")
    if config.kl_in in ("loss", "response_loss") and config.kl_target is not None:
        found = f"found {config.kl_target:g} with kl_in: {config.kl_in}"
        yield Fault("kl_target", found, "no kl_target: kl_coef is fixed in the loss", "remove it, or set kl_in: reward")
    if config.kl_in in ("loss", "response_loss") and config.whiten_advantages:
        found = f"found true with kl_in: {config.kl_in}, where it would change the weight of the reward against the KL"
        yield Fault("whiten_advantages", found, "false", "remove it, or set kl_in: reward")
