"""The baselines of the demo: rejection sampling, SFT on preferred responses, and arms without training."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.experiment.run import run_experiment
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report import load

CONFIG = Path(__file__).parent.parent.parent / "configs/demo/baselines.yaml"
SHORT = (
    "sft.max_steps=40 pairs.num=600 reward.max_steps=4 best.num=200 raft.max_steps=2 preferred.max_steps=2 "
    "ppo.max_steps=1 dpo.max_steps=2 compare.samples=2 compare.exact=false compare.best_of=[2]"
)


@pytest.mark.check
@pytest.mark.slow
def test_the_baselines_run_and_are_done_once(tmp_path, undrawn, capsys):
    made = [run_experiment(CONFIG, SHORT.split(), tmp_path, quiet=True) for _ in range(2)]
    assert all(stage["skipped"] for stage in made[1]["stages"].values())
    results = load(tmp_path / "reports/baselines/results.json")
    rows = {row.arm: row for row in results.trained()}
    assert list(rows) == ["sft@v1", "ppo", "dpo", "raft", "preferred", "few_shot:sft", "icdpo:sft"]
    assert {arm: row.model for arm, row in rows.items()}["icdpo:sft"] == "icdpo:sft@v1"
    assert rows["icdpo:sft"].in_context.source == rows["few_shot:sft"].in_context.source == "collected:pairs@v1"
    assert rows["few_shot:sft"].in_context.chosen_by == "reward@v1"
    assert {"reward@v1", "dpo@v1", "icdpo:sft@v1", "log p of sft@v1"} <= set(results.preferences.scorers)
    best = Registry(tmp_path).resolve_data("best").manifest
    assert best.config["labels"] == "best" and best.parents["judge"].ref == "reward@v1"
    assert Registry(tmp_path).resolve("raft").manifest.data[0].source == "collected:best@v1"
