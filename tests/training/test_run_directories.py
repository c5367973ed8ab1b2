"""Names of run directories: what resumes, what starts a new version."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.training.run_directory import run_directory


def made(path: Path, status: str) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"status": status}))
    return path


def test_names(tmp_path):
    def directory(resume=True):
        return run_directory(tmp_path, "model", "0123456789abcdef", resume=resume)

    first = tmp_path / "runs" / "model-0123456789"
    assert directory() == first
    made(first, "running")
    assert directory() == first
    assert directory(resume=False) == first.with_name("model-0123456789-2")
    (first / "run.json").write_text(json.dumps({"status": "finished"}))
    second = directory()
    assert second == first.with_name("model-0123456789-2")
    made(second, "running")
    assert directory() == second
    (second / "run.json").write_text("{")  # cut by a killed process: not finished
    assert directory() == second
    (second / "run.json").write_text(json.dumps({"status": "finished"}))
    assert directory() == first.with_name("model-0123456789-3")


def test_a_finished_run_starts_a_new_version(lab):
    first, second = lab.run("sft", max_steps=1), lab.run("sft", max_steps=1)
    assert (first.model, second.model) == ("tuned@v1", "tuned@v2")
    assert second.run == f"{first.run}-2"


def test_another_config_has_another_directory(lab):
    runs = {lab.run("sft", max_steps=1, seed=seed).run for seed in (0, 1)}
    assert len(runs) == 2


def test_without_resuming_an_unfinished_run_is_left_alone(lab):
    config = lab.config("sft", max_steps=1)
    unfinished = made(lab.home / "runs" / f"tuned-{config_digest(config)[:10]}", "running")
    (unfinished / "metrics.jsonl").write_text('{"step": 1}\n')
    result = lab.run("sft", max_steps=1, resume=False)
    assert result.run == f"{unfinished}-2"
    assert (unfinished / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_the_resolved_config_lies_beside_the_run(lab):
    result = lab.run("sft", max_steps=1)
    written = yaml.safe_load((Path(result.run) / "config.yaml").read_text())
    assert (written["max_steps"], written["output_name"], written["adam_beta1"]) == (1, "tuned", 0.9)
    assert (Path(result.run) / "log.txt").read_text().startswith("sft: run tuned-")


def test_runs_of_different_precision_in_one_process(tiny):
    from rlhf_pipeline.training.run import make_accelerator

    for bf16 in (False, True, False):
        found = make_accelerator(tiny.config("dpo", bf16=bf16))
        assert found.mixed_precision == ("bf16" if bf16 else "no")
