from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.registry.store import Registry


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "home")


@pytest.fixture
def model():
    """Return a writer of a small model folder: its weights are the given text."""

    def make(weights: str = "weights", architecture: str = "LlamaForCausalLM", steps: tuple[int, ...] = ()):
        def write(folder: Path) -> None:
            for place in [folder, *(folder / "snapshots" / f"step-{step}" for step in steps)]:
                place.mkdir(parents=True, exist_ok=True)
                (place / "config.json").write_text(json.dumps({"architectures": [architecture]}))
                (place / "model.safetensors").write_text(weights if place == folder else f"{weights} {place.name}")

        return write

    return make
