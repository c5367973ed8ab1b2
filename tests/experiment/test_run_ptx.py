"""The demo of PPO's options on the pretraining stream and on the scale of scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.experiment.run import run_experiment
from rlhf_pipeline.report import load

CONFIG = Path(__file__).parent.parent.parent / "configs/demo/ptx.yaml"
SHORT = (
    "sft.max_steps=20 pairs.num=300 reward.max_steps=4 ppo.max_steps=1 ptx.max_steps=1 scaled.max_steps=1 "
    "normalised.max_steps=1 dpo.max_steps=1 compare.samples=1 compare.exact=false compare.best_of=[2]"
)


@pytest.mark.check
@pytest.mark.slow
def test_the_arms_run_and_are_done_once(tmp_path, undrawn):
    made = [run_experiment(CONFIG, SHORT.split(), tmp_path, quiet=True) for _ in range(2)]
    assert all(stage["skipped"] for stage in made[1]["stages"].values())
    rows = {row.arm: row for row in load(tmp_path / "reports/ptx/results.json").trained()}
    kinds = {arm: row.optimum for arm, row in rows.items()}
    same = dict.fromkeys(("sft@v1", "ppo", "dpo"), "same")
    assert kinds == {**same, "ptx": "other", "scaled": "scale", "normalised": "scale"}
    assert rows["scaled"].moves_optimum == {"reward_scale": 2.0, "effective_kl_coef": 0.5}
    assert rows["ptx"].moves_optimum == {"ptx_coef": 0.5}
    assert set(rows["normalised"].moves_optimum) == {"normalize_rewards", "effective_kl_coef"}
