"""The quick part of what `make faults` does at length: killed, stopped and terminated runs go on as if nothing was."""

from __future__ import annotations

import signal

import pytest

from tests.faults import children, jobs, kills, subjects

pytestmark = pytest.mark.check


def named(disturbed, name):
    return next(subject for subject in disturbed if subject.name == name)


CASES = [("sft", 0.15), ("train-rm", 0.4), ("dpo", 0.6), ("ppo", 0.8), ("ppo", 0.97), (subjects.EXPERIMENT, 0.7)]


@pytest.mark.parametrize(("name", "part"), CASES)
def test_killed_in_the_middle_of_writing(disturbed, tmp_path, name, part):
    subject = named(disturbed, name)
    home = subject.home(tmp_path / "home")
    number = int(part * subject.acts)
    killed = children.run(subject.command(home), tmp_path, before=children.die_at(home, number))
    assert (killed.code, killed.killed_by) == (None, signal.SIGKILL)
    assert kills.torn(home) == []
    assert kills.judge(subject, home, children.run(subject.command(home), tmp_path)) == []


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_stopped_at_every_step_of_one_run(disturbed, tmp_path, name):
    subject = named(disturbed, name)
    home = subject.home(tmp_path / "home")
    for step in range(1, 6):
        stopped = children.run(subject.command(home), tmp_path, before=kills.signal_at(step))
        assert stopped.code == 143, stopped.err
        assert kills.checkpoints(home)[-1].name == f"step-{step}"
    assert kills.judge(subject, home, children.run(subject.command(home), tmp_path)) == []


def test_interrupted_by_the_keyboard(disturbed, tmp_path):
    subject = named(disturbed, "dpo")
    home = subject.home(tmp_path / "home")
    stopped = children.run(subject.command(home), tmp_path, before=kills.signal_at(2, signal.SIGINT))
    assert stopped.code == 130
    assert "run the same command to resume" in stopped.err and "Traceback" not in stopped.err


def test_the_harness_sees_a_difference(disturbed, tmp_path):
    subject = named(disturbed, "sft")
    home = subject.home(tmp_path / "home")
    words = [*subject.command(home), "learning_rate=0.5"]
    assert any(
        "differs: models/tuned/v1" in fault for fault in kills.judge(subject, home, children.run(words, tmp_path))
    )


def test_the_harness_sees_a_torn_version(disturbed, tmp_path):
    subject = named(disturbed, "sft")
    home = subject.home(tmp_path / "home")
    (home / "models/sft/v1/model.safetensors").write_bytes(b"")
    assert any("model.safetensors" in fault for fault in kills.torn(home))


def test_the_parent_of_several_runs_at_a_time_is_killed(tmp_path, undrawn):
    """No worker is left; the rerun has the weights, metrics and version numbers of runs one after another."""
    children.prepare()
    found = jobs.kills_of_parents(tmp_path, count=1, seeds=[0])
    assert (found["trials"], found["hits"], found["failed"]) == (2, 1, [])
