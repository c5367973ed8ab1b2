"""Pairs on which two engines are set against each other, and runs of both."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.data.world.vocabulary import ADJECTIVES, ASPECTS, FRAME, GENRES, MODIFIERS

SETTINGS = {
    "dataset_train_split": "all",
    "dataset_test_split": "all",
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
}


def word_pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of words of the built-in world: prompts of 2 to 6 tokens, responses of 1 to 4, half of them cut."""
    draw = random.Random(1)
    rows = []
    while len(rows) < count:
        row: dict[str, Any] = {"prompt": " ".join(draw.choices(FRAME + GENRES + ASPECTS, k=draw.randint(2, 6)))}
        for name in ("chosen", "rejected"):
            row[f"{name}_ended"] = ended = draw.random() < 0.5
            words = draw.choices(ADJECTIVES + MODIFIERS, k=draw.randint(1, 3 if ended else 4))
            row[name] = " " + " ".join(words)  # at most 4 tokens, the end token of an ended one included
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    return rows


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., str]:
    """Write pairs and return their file."""

    def write(count: int = 22, rows: list[dict[str, Any]] | None = None) -> str:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows or word_pairs(count)))
        return str(path)

    return write


@pytest.fixture
def both(lab, pairs) -> Callable[..., tuple[Any, Any]]:
    """Run a stage natively and on TRL's trainer; returns both results."""

    def run(stage: str, **changes: Any) -> tuple[Any, Any]:
        changes = {**SETTINGS, **changes}
        if "dataset_name" not in changes:
            changes["dataset_name"] = pairs()
        native, theirs = (lab.run(stage, output_name=name, engine=name, **changes) for name in ("native", "trl"))
        return native, theirs

    return run
