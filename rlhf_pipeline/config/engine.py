"""What `engine: trl` cannot do; the sources of TRL 1.16 were read for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_pipeline.errors import Fault

if TYPE_CHECKING:
    from rlhf_pipeline.config.dpo import DpoConfig
    from rlhf_pipeline.config.reward import RewardConfig
    from rlhf_pipeline.config.training import TrainingConfig

NATIVE = "or engine: native"


def check_engine(config: TrainingConfig) -> Iterator[Fault]:
    """Yield the faults of what `engine: trl` does in no stage."""
    if config.engine != "trl":
        return
    if config.stage == "ppo":
        found = "found 'trl', and TRL 1.16 has no PPO trainer"
        yield Fault("engine", found, "'native'", "engine: trl works for sft, train-rm and dpo")
        return
    if config.save_steps is not None:
        yield Fault("save_steps", "engine trl writes no checkpoints and cannot resume", "no save_steps", NATIVE)
    if config.snapshot_steps is not None:
        yield Fault("snapshot_steps", "engine trl takes no snapshots", "no snapshot_steps", NATIVE)
    if config.micro_batch_tokens is not None:
        found = "engine trl cuts micro-batches by examples only"
        yield Fault("micro_batch_tokens", found, "no micro_batch_tokens", NATIVE)


def check_reward_engine(config: RewardConfig) -> Iterator[Fault]:
    """Yield the faults of `engine: trl` for the reward model."""
    if config.engine == "trl" and config.score_pooling != "last":
        found = f"found {config.score_pooling!r}, and TRL trains the score at the last token"
        yield Fault("score_pooling", found, "'last'", NATIVE)


def check_dpo_engine(config: DpoConfig) -> Iterator[Fault]:
    """Yield the faults of `engine: trl` for DPO."""
    if config.engine != "trl":
        return
    if config.loss_type == "ipo":
        found = "TRL has no ipo on summed log-probabilities: its 'ipo' averages them over each response's tokens"
        yield Fault("loss_type", found, "'sigmoid' or 'ipo_mean'", NATIVE)
    if config.loss_type == "plackett_luce":
        found = "found 'plackett_luce', and TRL's trainer takes pairs alone: rankings are split into theirs"
        yield Fault("loss_type", found, "'sigmoid' or 'ipo_mean'", NATIVE)
    if config.label_smoothing and config.loss_type == "sigmoid":
        found = f"found {config.label_smoothing:g}, which TRL's sigmoid loss ignores without a word"
        yield Fault("label_smoothing", found, "0", NATIVE)
    if config.soft_labels:
        yield Fault("soft_labels", "TRL trains on hard labels alone", "false", NATIVE)
    if config.population:
        found = f"{config.dataset_name}: pairs drawn anew at every step with label probabilities, which TRL lacks"
        yield Fault("dataset_name", found, "recorded pairs", NATIVE)
