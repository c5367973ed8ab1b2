"""`rlhf STAGE --num-processes 2` on a CPU: its result, a mistake of the user, a signal, a killed process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import DEFAULTS
from tests.faults.children import Child, Outcome, fresh

pytestmark = [pytest.mark.slow, pytest.mark.check]

SETTINGS = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 1.0}


def start(lab, folder: Path, stage: str, *words: str, **changes) -> Child:
    """Start the command line with a config."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**DEFAULTS[stage], **SETTINGS, **changes}))
    return fresh([stage, "--config", str(config), "--home", str(lab.home), *words], folder)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(lab, child: Child, name: str) -> Path:
    """Wait until a run has logged an update; returns its folder."""
    until = time.monotonic() + 100
    while time.monotonic() < until and not child.ended():
        for path in (lab.home / "runs").glob(f"{name}-*/metrics.jsonl"):
            if path.stat().st_size:
                return path.parent
        time.sleep(0.05)
    raise AssertionError(child.err.read_text())


def one_error(outcome: Outcome, code: int) -> str:
    """The only error that was printed."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    return line


def test_the_same_metrics_as_one_process_with_batches_of_twice_the_size(lab, tmp_path):
    outcome = start(
        lab, tmp_path / "two", "dpo", "--num-processes", "2", "--json", per_device_train_batch_size=4
    ).wait()
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    expected = lab.run("dpo", output_name="whole", **SETTINGS, per_device_train_batch_size=8)
    assert (found["stage"], found["model"]) == ("dpo", "dpo@v1")
    assert found["metrics"]["processes"] == 2
    mine, theirs = lab.rows(found["run"]), lab.rows(expected.run)
    for row, other in zip(mine, theirs, strict=True):
        other["rewards/accuracies"] = row["rewards/accuracies"]  # signs of differences that are rounding at first
        assert row == pytest.approx(other, abs=1e-5)
    log = (Path(found["run"]) / "log.txt").read_text()
    assert "2 processes of 1 threads" in log and log.count("registered dpo@v1") == 1
    assert outcome.err.count("registered dpo@v1") == 1


def test_a_mistake_is_told_once(lab, tmp_path):
    """Three processes cannot divide a minibatch of 8; each of them finds that."""
    outcome = start(lab, tmp_path / "three", "ppo", "--num-processes", "3", "--json").wait()
    told = "rollout_batch_size: a minibatch of 8 responses on 3 processes; expected a minibatch that 3 divides"
    assert one_error(outcome, 2) == f"error: {told}"
    (fault,) = json.loads(outcome.out)["error"]["faults"]
    assert (fault["where"], fault["found"]) == ("rollout_batch_size", "a minibatch of 8 responses on 3 processes")
    assert not list((lab.home / "runs").glob("ppo-*"))


def test_a_signal_keeps_a_checkpoint_and_the_run_resumes_in_one_process(lab, tmp_path):
    child = start(lab, tmp_path / "two", "dpo", "--num-processes", "2", max_steps=100_000)
    run = wait_for(lab, child, "dpo")
    processes = children_of(child.pid)
    assert len(processes) == 2
    child.send(signal.SIGTERM)
    outcome = child.wait()
    assert "stopped by signal 15 at step" in one_error(outcome, 143)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    again = start(lab, tmp_path / "one", "dpo", max_steps=100_000)
    until = time.monotonic() + 100
    while f"resumed at step {checkpoint.name[5:]} of 100000; it began in 2 processes" not in again.err.read_text():
        assert time.monotonic() < until and not again.ended(), again.err.read_text()
        time.sleep(0.05)
    again.send(signal.SIGTERM)
    one_error(again.wait(), 143)


def test_a_killed_process_ends_the_run(lab, tmp_path):
    child = start(lab, tmp_path / "two", "dpo", "--num-processes", "2", max_steps=100_000)
    wait_for(lab, child, "dpo")
    processes = children_of(child.pid)
    os.kill(processes[1], signal.SIGKILL)
    outcome = child.wait()
    assert "process 1 of 2 was killed by signal 9 (SIGKILL)" in one_error(outcome, 1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
