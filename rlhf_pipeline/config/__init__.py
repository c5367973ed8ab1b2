"""Configs: strict, frozen, and checked in full before anything heavy is imported."""

from rlhf_pipeline.config.base import Lengths, moves_optimum, resolve_lengths
from rlhf_pipeline.config.dump import config_digest, dump_yaml
from rlhf_pipeline.config.experiment import Experiment, StageSpec, load_experiment
from rlhf_pipeline.config.load import Loaded, load_config
from rlhf_pipeline.config.references import Reference, references
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
    "PpoConfig",
    "Reference",
    "RewardConfig",
    "RewardFunction",
    "SftConfig",
    "StageSpec",
    "TrainingConfig",
    "config_digest",
    "dump_yaml",
    "load_config",
    "load_experiment",
    "moves_optimum",
    "references",
    "resolve_lengths",
]
