"""Configs: strict, frozen, and fully checked before any heavy import."""

from rlhf_pipeline.config.base import Lengths, moves_optimum, resolve_lengths
from rlhf_pipeline.config.dump import config_digest, dump_yaml
from rlhf_pipeline.config.experiment import Experiment, StageSpec, load_experiment
from rlhf_pipeline.config.load import Loaded, load_config
from rlhf_pipeline.config.mentions import Mention, mentions
from rlhf_pipeline.config.stages import (
    SCHEMAS,
    STAGES,
    CollectConfig,
    CompareConfig,
    DatasetEntry,
    DpoConfig,
    EvaluateConfig,
    ExperimentConfig,
    PpoConfig,
    RewardConfig,
    RewardFunction,
    SftConfig,
    TrainingConfig,
)

__all__ = [
    "SCHEMAS",
    "STAGES",
    "CollectConfig",
    "CompareConfig",
    "DatasetEntry",
    "DpoConfig",
    "EvaluateConfig",
    "Experiment",
    "ExperimentConfig",
    "Lengths",
    "Loaded",
    "Mention",
    "PpoConfig",
    "RewardConfig",
    "RewardFunction",
    "SftConfig",
    "StageSpec",
    "TrainingConfig",
    "config_digest",
    "dump_yaml",
    "load_config",
    "load_experiment",
    "mentions",
    "moves_optimum",
    "resolve_lengths",
]
