"""All config classes, by the command that reads them."""

from __future__ import annotations

from rlhf_pipeline.config.base import CommandConfig
from rlhf_pipeline.config.collect import CollectConfig, SamplingConfig
from rlhf_pipeline.config.compare import CompareConfig, EvaluateConfig, ExactConfig, GenerateConfig, PromptsConfig
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.config.plan import ExperimentConfig
from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import ConfigError, Fault, did_you_mean

ModelConfig = TrainingConfig | SamplingConfig | PromptsConfig
"""The config of a command that loads models."""
RewardConfigs = PpoConfig | SftConfig | SamplingConfig | PromptsConfig
"""The config of a command that loads reward sources."""
StageConfig = TrainingConfig | CollectConfig
"""The config of a stage: a command that makes a model or data."""
STAGES: dict[str, type[TrainingConfig] | type[CollectConfig]] = {
    "sft": SftConfig,
    "train-rm": RewardConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "collect": CollectConfig,
}
SCHEMAS: dict[str, type[CommandConfig]] = {
    **STAGES,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "compare": CompareConfig,
    "exact": ExactConfig,
    "label": LabelConfig,
    "experiment": ExperimentConfig,
}
TRAINING = ("sft", "train-rm", "ppo", "dpo")


def schema_class(stage: str) -> type[CommandConfig]:
    """Return the config class of a command.

    Raises:
        ConfigError: there is no such command.
    """
    if stage not in SCHEMAS:
        near = did_you_mean(stage, SCHEMAS)
        raise ConfigError(Fault("stage", f"found {stage!r}", f"one of {', '.join(SCHEMAS)}", near))
    return SCHEMAS[stage]
