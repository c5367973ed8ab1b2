"""All config classes, by the command that reads them."""

from __future__ import annotations

from rlhf_pipeline.config.base import CommandConfig, Lengths, moves_optimum
from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.compare import CompareConfig, EvaluateConfig, ExactConfig
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.plan import ExperimentConfig
from rlhf_pipeline.config.ppo import PpoConfig, RewardFunction
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.config.training import DatasetEntry, TrainingConfig

STAGES: dict[str, type[CommandConfig]] = {
    "sft": SftConfig,
    "train-rm": RewardConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "collect": CollectConfig,
}
SCHEMAS: dict[str, type[CommandConfig]] = {
    **STAGES,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "exact": ExactConfig,
    "experiment": ExperimentConfig,
}
TRAINING = ("sft", "train-rm", "ppo", "dpo")

__all__ = [
    "SCHEMAS",
    "STAGES",
    "TRAINING",
    "CollectConfig",
    "CompareConfig",
    "DatasetEntry",
    "DpoConfig",
    "EvaluateConfig",
    "ExactConfig",
    "ExperimentConfig",
    "Lengths",
    "PpoConfig",
    "RewardConfig",
    "RewardFunction",
    "SftConfig",
    "TrainingConfig",
    "moves_optimum",
]
