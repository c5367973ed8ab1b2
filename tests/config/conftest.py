"""What the config tests share: valid values of every stage, and the faults of a refused config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import ConfigError

MODEL = {"model_name_or_path": "sft", "dataset_name": "org/data", "output_name": "model"}
VALID = {
    "sft": MODEL,
    "train-rm": MODEL,
    "ppo": {**MODEL, "reward_model_path": "reward", "total_episodes": 640},
    "dpo": MODEL,
    "collect": {
        "policy": "sft",
        "prompts": "world:verdicts",
        "judge": "world",
        "num": 8,
        "output_name": "pairs",
    },
    "evaluate": {},
    "generate": {},
    "compare": {"arms": ["a", "b"]},
    "exact": {},
    "label": {"policies": ["sft"], "prompts": "org/data"},
    "experiment": {"name": "demo", "stages": {"sft": {"stage": "sft"}}},
}


@pytest.fixture
def valid() -> dict[str, dict]:
    """The smallest valid values of each stage."""
    return {stage: dict(values) for stage, values in VALID.items()}


@pytest.fixture
def load(valid) -> Callable:
    """Load a stage's smallest valid config with changes; None as a value takes the key out."""

    def run(stage: str, /, **changes):
        values = {key: value for key, value in {**valid[stage], **changes}.items() if value is not None}
        return load_config(stage, None, extra=values).config

    return run


@pytest.fixture
def faults(load) -> Callable:
    """Return the faults of a refused config as {key: fault}."""

    def run(stage: str, /, **changes):
        with pytest.raises(ConfigError) as caught:
            load(stage, **changes)
        return {fault.where.split(": ")[-1]: fault for fault in caught.value.faults}

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a text file below a temporary folder."""

    def run(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return run
