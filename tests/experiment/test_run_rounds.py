"""Rounds by the command line: every round is made, measured and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlhf_pipeline.cli.main import main
from tests.experiment.test_run_seeds import CPU, TRAINING

CONTENT = {
    "name": "trial",
    "rounds": 2,
    "stages": {
        "pairs": {
            **CPU,
            "stage": "collect",
            "policy": "sft",
            "prompts": "world:verdicts",
            "judge": "world",
            "num": 60,
        },
        "scorer": {
            **TRAINING,
            "stage": "train-rm",
            "model_name_or_path": "sft",
            "dataset_name": "pairs",
            "reward_centering_samples": 16,
        },
        "ppo": {
            **TRAINING,
            "stage": "ppo",
            "model_name_or_path": "sft",
            "reward_model_path": "scorer",
            "dataset_name": "pairs",
            "rollout_batch_size": 8,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
        },
        "dpo": {**TRAINING, "stage": "dpo", "model_name_or_path": "sft", "dataset_name": "pairs", "beta": 0.05},
    },
    "compare": {**CPU, "arms": ["ppo", "dpo"], "baseline": "sft", "max_prompts": 4, "samples": 2, "exact": False},
}
del CONTENT["compare"]["max_prompt_length"], CONTENT["compare"]["response_length"]
MADE = ("pairs", "scorer", "ppo", "dpo", "pairs-ppo-2", "scorer-ppo-2", "ppo-2", "pairs-dpo-2", "dpo-2")


@pytest.mark.check
def test_rounds_are_made_compared_and_skipped_when_done(lab, tmp_path: Path, capsys):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    command = ["run", str(path), "--home", str(lab.home), "--json"]
    assert main([*command, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(planned["stages"]) == list(MADE)
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["stages"]) == list(MADE)
    registry = lab.registry

    # The second round's data come from the policy of the first, for the prompts that follow.
    collected = registry.resolve_data("pairs-dpo-2").manifest
    assert collected.parents["policy"].ref == "dpo@v1" and collected.config["first_record"] == 60
    dpo = registry.resolve("dpo-2").manifest
    sources = [result["stages"][name]["model"] for name in ("pairs", "pairs-dpo-2")]
    counts = [registry.resolve_data(name).manifest.metrics["by_split"]["train"] for name in sources]
    assert [(entry.source, entry.kept) for entry in dpo.data] == [
        (f"collected:{name}", count) for name, count in zip(sources, counts, strict=True)
    ]
    assert dpo.parents["base"].ref == dpo.parents["reference"].ref == "sft@v1"
    assert registry.resolve("ppo-2").manifest.parents["reward_model"].ref == "scorer-ppo-2@v1"

    # Every round is an arm, with its Elo.
    arms = [row["arm"] for row in result["comparison"]["rows"] if row["arm"]]
    assert arms == ["sft@v1", "ppo", "ppo-2", "dpo", "dpo-2"]

    assert main(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert all(stage["skipped"] for stage in again["stages"].values())
