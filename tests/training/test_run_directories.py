"""Names of run directories: what resumes, what starts a new version."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import yaml

from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.experiment.done import find_done
from rlhf_pipeline.stages import dpo
from rlhf_pipeline.training.open_run import run_is_empty
from rlhf_pipeline.training.run_directory import open_directory, run_directory


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


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo", "collect"])
def test_a_run_its_config_and_its_manifest_have_one_digest(lab, stage):
    """Where the lengths are those of the parent (6 and 4), they are in the config before anything is named after it."""
    open_lengths = dict.fromkeys(("max_prompt_length", "response_length"))
    short = {"max_steps": 1} if stage != "collect" else {"num": 8}
    result = lab.run(stage, **open_lengths, **short)
    registry = lab.registry
    version = registry.resolve_data(result.model) if stage == "collect" else registry.resolve(result.model)
    made = version.manifest
    assert (made.config["max_prompt_length"], made.config["response_length"]) == (6, 4)
    values = {key: value for key, value in made.config.items() if value is not None}
    digest = config_digest(load_config(stage, None, extra=values).config)
    assert made.config_digest == digest
    if stage != "collect":
        assert Path(result.run).name == f"{version.name}-{digest[:10]}"
    # Given or taken over, the lengths are the same config.
    assert find_done(lab.config(stage, **open_lengths, **short), registry).label == result.model
    assert find_done(lab.config(stage, **short), registry).label == result.model


def test_the_config_beside_a_run_takes_the_run_up_again(lab, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lab.run("dpo", max_prompt_length=None, response_length=None, max_steps=1)
    (directory,) = (lab.home / "runs").iterdir()
    config = load_config("dpo", directory / "config.yaml", []).config
    assert dpo.run_dpo(config, lab.home, quiet=True).run == str(directory)


def test_a_version_of_an_earlier_release_is_found_by_the_config_as_it_was_given(lab):
    """Its digest is of the config without the parent's lengths."""
    given = lab.config("dpo", max_prompt_length=None, response_length=None, max_steps=1)
    made = lab.registry.resolve(lab.run("dpo", max_steps=1).model)
    fields = {name: getattr(made.manifest, name) for name in ("config", "parents", "data")}
    older = given.model_copy(update={"output_name": "older"})
    files = made.path / "config.json"
    lab.registry.publish(
        "older",
        "dpo",
        lambda folder: (folder / files.name).write_bytes(files.read_bytes()),
        **fields,
        config_digest=config_digest(older),
    )
    assert find_done(older, lab.registry).label == "older@v1"


def test_runs_of_different_precision_in_one_process(tiny):
    from rlhf_pipeline.training.accelerator import make_accelerator

    for bf16 in (False, True, False):
        found = make_accelerator(tiny.config("dpo", bf16=bf16))
        assert found.mixed_precision == ("bf16" if bf16 else "no")


def test_a_gap_in_the_numbers_hides_no_unfinished_run(tmp_path):
    runs = tmp_path / "runs"
    made(runs / "model-0123456789-2", "running")
    made(runs / "model-0123456789-4", "finished")
    made(runs / "model-0123456789-x", "running")

    def directory(resume):
        return run_directory(tmp_path, "model", "0123456789abcdef", resume=resume).name

    assert directory(True) == "model-0123456789-2"
    assert directory(False) == "model-0123456789-5"


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, resume):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    directory, file = open_directory(tmp_path, "model", "0123456789abcdef", resume=resume)
    file.close()
    assert directory.name == "model-0123456789"


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    _, file = open_directory(tmp_path, "model", "0123456789abcdef", resume=True)
    (ready, say_ready), (wait, let_go) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(let_go)
        os.write(say_ready, b"x")
        os.read(wait, 1)  # until the parent lets go
        os._exit(0)
    os.read(ready, 1)
    file.close()
    _, again = open_directory(tmp_path, "model", "0123456789abcdef", resume=True)
    again.close()
    os.close(let_go)
    os.waitpid(pid, 0)


def test_a_folder_with_the_account_of_a_failure_is_not_empty(tmp_path):
    assert run_is_empty(tmp_path)
    (tmp_path / "failure").mkdir()
    assert not run_is_empty(tmp_path)
