"""Keys of `rlhf train-rm`: a reward model from preference pairs or rankings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from rlhf_pipeline.config.base import Count, NonNegative, Positive, option
from rlhf_pipeline.config.sharding import OFF
from rlhf_pipeline.config.training import COMMON_CHECKS, NATIVE, TrainingConfig, check_model
from rlhf_pipeline.errors import Fault


def check_reward_engine(config: RewardConfig) -> Iterator[Fault]:
    """Yield the faults of `engine: trl` for the reward model."""
    if config.engine == "trl" and config.score_pooling != "last":
        found = f"found {config.score_pooling!r}, but TRL trains the score at the last token"
        yield Fault("score_pooling", found, "'last'", NATIVE)


def check_centering(config: RewardConfig) -> Iterator[Fault]:
    """Yield the fault of samples of the whole parent in a stage that divides its weights."""
    if config.fsdp and config.reward_centering == "reference_samples":
        found = "found 'reference_samples' with fsdp, but only a whole parent can sample"
        yield Fault("reward_centering", found, "'chosen' or 'none'", OFF)


class RewardConfig(TrainingConfig):
    """Config of `rlhf train-rm`."""

    stage: ClassVar[str] = "train-rm"
    checks: ClassVar = (check_model, *COMMON_CHECKS, check_reward_engine, check_centering)

    learning_rate: Positive = option(1e-5, "peak learning rate of AdamW (ours: TRL's 1e-4 suits LoRA)")
    reward_centering: Literal["reference_samples", "chosen", "none"] = option(
        "reference_samples",
        "responses whose mean score is shifted to 0: samples of the parent model (InstructGPT), or the chosen "
        "responses. The shift is a constant: it changes no ranking, and moves PPO's optimum only with whiten_rewards",
    )
    reward_centering_samples: Count = option(512, "number of responses whose mean score is the shift (ours)")
    center_rewards_coefficient: NonNegative | None = option(
        None,
        "weight of mean((r_w + r_l)^2) in the loss; null: none (TRL, arXiv 2312.09244). It shrinks reward differences, "
        "not only their mean (x .84 at .01, x .46 at .1, x .11 at 1 in one small world), so PPO's KL penalty weighs "
        "that much more; reward_centering shifts rewards without shrinking them",
        moves_optimum=True,
    )
    use_margin: bool = option(
        False,
        "subtract the pairs' column `margin` from the difference of the scores (Llama 2, eq. 2; TRL does so whenever "
        "the column is there)",
        moves_optimum=True,
    )
    score_pooling: Literal["last", "mean"] = option(
        "last",
        "score at the response's last token, or its mean over the response (InstructGPT: last); same minimiser, if the "
        "network can represent it",
    )
