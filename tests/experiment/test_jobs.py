"""Several runs at a time: the same models and numbers as one after another, failures, signals, a parent that dies."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import expand
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.experiment import jobs
from rlhf_pipeline.experiment.done import survey
from rlhf_pipeline.experiment.estimate import estimate_experiment
from rlhf_pipeline.experiment.jobs import reserve_numbers
from rlhf_pipeline.experiment.progress import makespan, progress_at_once, urgency
from rlhf_pipeline.experiment.ray_crew import _Node, _sees
from rlhf_pipeline.experiment.run import run_experiment
from rlhf_pipeline.experiment.workers import Answer, threads_each
from tests.faults import children

ROOT = Path(__file__).parents[2]
CPU = {"use_cpu": True, "num_threads": 1, "max_prompt_length": 6, "response_length": 4}
TRAINING = {**CPU, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_steps": 3, "save_steps": 1}
DATA = {"dataset_name": "collected:pairs"}
START = {"model_name_or_path": "start"}
CONTENT: dict[str, Any] = {
    "name": "trial",
    "seeds": [0, 1],
    "stages": {
        "start": {**TRAINING, **DATA, "stage": "sft", "model_name_or_path": "sft"},
        "scorer": {**TRAINING, **DATA, **START, "stage": "train-rm", "reward_centering_samples": 16},
        "ppo": {
            **TRAINING,
            **DATA,
            **START,
            "stage": "ppo",
            "reward_model_path": "scorer",
            "rollout_batch_size": 8,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
        },
        "dpo": {**TRAINING, **DATA, **START, "stage": "dpo"},
    },
    "compare": {
        "arms": ["ppo", "dpo"],
        "baseline": "start",
        "samples": 2,
        "max_prompts": 4,
        "max_new_tokens": 2,
        **CPU,
    },
    "sweep": {"dpo.beta": [0.1, 0.5]},
}
CONTENT["compare"].pop("max_prompt_length"), CONTENT["compare"].pop("response_length")
# start; for each seed the reward model, PPO, and DPO at two settings
RUNS = ["start"]
for _seed in (0, 1):
    RUNS += [f"scorer seed {_seed}", f"ppo seed {_seed}", f"dpo beta=0.1 seed {_seed}", f"dpo beta=0.5 seed {_seed}"]
LABELS = ["start@v1"]
for _seed in (0, 1):
    LABELS += [f"scorer@v{_seed + 1}", f"ppo@v{_seed + 1}", f"dpo@v{2 * _seed + 1}", f"dpo@v{2 * _seed + 2}"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return file


def timeless(value: Any) -> Any:
    """Results without times, memory, and paths of the home."""
    if isinstance(value, dict):
        times = ("seconds", "memory", "created", "per_second")
        return {key: timeless(part) for key, part in value.items() if not any(word in key for word in times)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def test_the_time_of_runs_side_by_side():
    """By hand: 0 takes 2; 1 and 2 need it; 3 needs nothing."""
    seconds, inputs = [2.0, 3.0, 1.0, 4.0], [(), (0,), (0,), ()]
    assert makespan(seconds, inputs, 1) == 10
    # 0 | 3 until 2 | 4: 1 starts at 2, 2 at 4, and both end at 5.
    assert makespan(seconds, inputs, 2) == 5
    assert makespan(seconds, inputs, 3) == 5
    assert makespan([1.0, 1.0, 5.0], [(), (0,), (1,)], 4) == 7  # a chain
    assert makespan([], [], 2) == 0
    # 2, which 3 needs, starts first, beside 0; 1 from 1 to 3; 3 from 2 to 5. In order it would be 6.
    assert makespan([2.0, 2.0, 1.0, 3.0], [(), (), (), (2,)], 2) == 5
    assert urgency([(), (0,), (0,), (1,), (2, 3), ()]) == [3, 2, 1, 1, 0, 0]


def test_progress_of_runs_side_by_side(path):
    nodes = expand(load_experiment(path, [], known_models=["sft"]))
    ended = [("start", False, 10.0), ("scorer", False, 30.0), ("scorer", True, 10.0), ("dpo", False, 8.0)]
    # PPO has taken no time yet.
    assert progress_at_once({2: 5.0, 4: 0.0}, nodes, ended, 2) == "ran 3, skipped 1, running 1"
    # A scorer (20 s) runs until 15; beside it one DPO run until 8, the next until 16; the last from 15 to 23.
    told = progress_at_once({5: 5.0, 4: 0.0, 7: 0.0, 8: 0.0}, nodes, ended, 2)
    assert told == "ran 3, skipped 1, running 1; about 23 s left"


def test_threads_are_divided(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert [threads_each(jobs) for jobs in (2, 3, 4, 9)] == [3, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads_each(2) is None


def test_numbers_are_those_of_a_run_in_order(lab, path):
    nodes = expand(load_experiment(path, [], known_models=lab.registry.models.names()))
    assert [node.label for node in nodes] == RUNS
    lab.registry.models.publish("dpo", "dpo", lambda folder: (folder / "weights").write_text("w"))
    numbers = reserve_numbers(nodes, survey(nodes, lab.registry), lab.registry)
    expected = [int(label.partition("@v")[2]) + label.startswith("dpo") for label in LABELS]
    assert list(numbers.values()) == expected
    # Another look, after a kill, gives the same numbers; a run that was not among them gets the next one.
    assert reserve_numbers(nodes, survey(nodes, lab.registry), lab.registry) == numbers
    more = expand(load_experiment(path, ["sweep.dpo.beta=[.05, .1, .5]"], known_models=lab.registry.models.names()))
    again = reserve_numbers(more, survey(more, lab.registry), lab.registry)
    assert [again[place] for place, node in enumerate(more) if node.name == "dpo"] == [6, 2, 3, 7, 4, 5]


@pytest.mark.check
def test_the_dry_run_knows_the_time_of_several_jobs(lab, path):
    one = estimate_experiment(path, [], lab.home)
    two = estimate_experiment(path, [], lab.home, jobs=2)
    assert "at_once" not in one
    assert two["total"] | {"seconds": 0} == one["total"] | {"seconds": 0}
    seconds = [two["estimates"][label]["seconds"] for label in RUNS]
    inputs = [(), *((0,), (1,), (0,), (0,)), *((0,), (5,), (0,), (0,))]
    after = two["estimates"]["compare"]["seconds"]
    assert two["at_once"] == {"jobs": 2, "seconds": pytest.approx(makespan(seconds, inputs, 2) + after / 2)}
    assert two["about"][0].startswith("whole experiment, 2 runs at a time: about ")


@pytest.mark.check
def test_two_at_a_time_are_what_one_after_another_is(lab, tiny, path, tmp_path, capfd):
    """Weights, numbers and figures, bit for bit; the output of the runs is in their logs."""
    beside = tiny.copy(tmp_path / "beside")
    words = ["run", str(path), "--json", "--home"]
    assert main([*words, str(lab.home)]) == 0
    one = json.loads(capfd.readouterr().out)
    assert main([*words, str(beside.home), "--jobs", "2"]) == 0
    said = capfd.readouterr()
    two = json.loads(said.out)
    assert [point["model"] for point in two["points"]] == [point["model"] for point in one["points"]] == LABELS
    for label in LABELS:
        assert beside.registry.resolve(label).digest == lab.registry.resolve(label).digest
    results = [json.loads((where.home / "reports/trial/results.json").read_text()) for where in (lab, beside)]
    first, second = (json.dumps(timeless(part)) for part in results)
    assert second.replace(str(beside.home), str(lab.home)) == first
    assert not list(beside.home.glob("models/*/reserved.json"))
    logs = sorted((beside.home / "logs/trial").iterdir())
    assert logs.pop().name == "compare.txt"
    assert [log.name for log in logs][::4] == ["1-start.txt", "5-dpo_beta=0.5_seed_0.txt", "9-dpo_beta=0.5_seed_1.txt"]
    assert "registered dpo@v4" in logs[8].read_text() and "registered" not in said.err
    assert "2 runs at a time with OMP_NUM_THREADS each" in said.err or "1 thread each" in said.err
    assert f"[9/9] dpo beta=0.5 seed 1: started; log {logs[8]}\n" in said.err
    assert sum(": done in " in line for line in said.err.splitlines()) == 9
    # All of it is there now.
    assert main([*words, str(beside.home), "--jobs", "2"]) == 0
    again = json.loads(capfd.readouterr().out)
    assert all(point["skipped"] for point in again["points"])


@pytest.mark.check
def test_a_failed_run_stops_only_those_that_need_it(lab, path, tmp_path, capfd, monkeypatch):
    (tmp_path / "judging.py").write_text(
        "import os\n\ndef zero(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n\n"
        "def broken(prompts, completions, **columns):\n    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["run", str(path), "--home", str(lab.home), "--jobs", "2", "compare=null"]
    broken = ["ppo.reward_model_path=null", "ppo.reward_functions=[{source: 'judging:broken', weight: 1}]"]
    diverging = ["dpo.learning_rate=1e30", "dpo.max_grad_norm=0"]
    assert main([*words, *broken, *diverging, "seeds=[0]", "sweep.dpo.beta=[.1]", "--json"]) == 1
    said = capfd.readouterr()
    error = json.loads(said.out)["error"]
    assert error["kind"] == "run"
    killed, diverged = (fault["found"] for fault in error["faults"][:2])
    assert "ppo" in killed and "killed by signal 9 (SIGKILL)" in killed
    assert diverged.startswith("dpo beta=0.1")
    assert "2 of 4 are done, 2 failed\n" in said.err
    assert f"the last lines of {lab.home / 'logs/trial'}" in said.err
    assert {"start", "scorer"} <= set(lab.registry.models.names())
    # Those that need the failed one are not started; the others are done.
    assert main([*words, "scorer.learning_rate=1e30", "scorer.max_grad_norm=0"]) == 1
    said = capfd.readouterr()
    assert "not started: ppo seed 0, ppo seed 1" in said.err
    assert "4 failed" not in said.err and "2 failed, 2 not started because they need one that failed" in said.err
    assert lab.registry.models.numbers("dpo") == [2, 3, 4, 5]


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `rlhf run` of two jobs at a time in a process of its own; what is left at the end of the test is killed."""
    processes = []

    def begin(home: Path, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rlhf_pipeline.cli.main", "run", str(path), "--jobs", "2", "--home", str(home)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JOBS_TEST": str(home)}
        processes.append(subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True, env=environment))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def wait_for(condition: Any, seconds: float = 300.0) -> None:
    """Look until a condition holds.

    Raises:
        TimeoutError: it did not.
    """
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.01)


LONG = [f"{stage}.{value}" for stage in ("dpo", "scorer") for value in ("max_steps=2000", "save_steps=2000")]
LONG += ["dpo.logging_steps=1", "scorer.logging_steps=1", "compare=null"]


def rows(home: Path) -> dict[str, int]:
    """How many updates each run has logged."""
    return {path.parent.name: path.read_bytes().count(b"\n") for path in home.glob("runs/*/metrics.jsonl")}


def two_are_training(home: Path) -> bool:
    return sum(not name.startswith("start") and count > 1 for name, count in rows(home).items()) >= 2


@pytest.mark.check
def test_a_signal_stops_all_and_the_same_command_continues(lab, start):
    def stopped_by(process: subprocess.Popen[str], number: signal.Signals) -> None:
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 128 + number, err
        stopped = f"error: stopped by signal {int(number)}: 1 of 9 are done; the same command continues from here"
        assert stopped in err and "Traceback" not in err
        assert children.gone("JOBS_TEST", str(lab.home), 0)

    process = start(lab.home, *LONG)
    wait_for(lambda: two_are_training(lab.home))
    stopped_by(process, signal.SIGTERM)
    before = rows(lab.home)
    written = {path.parts[-3]: int(path.name[5:]) for path in lab.home.glob("runs/*-*/checkpoints/step-*")}
    # A checkpoint at the last update of each; save_steps asks for none.
    assert {name: step for name, step in written.items() if not name.startswith("start")} == {
        name: count for name, count in before.items() if not name.startswith("start")
    }
    process = start(lab.home, *LONG)
    wait_for(lambda: any(count > before[name] for name, count in rows(lab.home).items() if before[name] < 2000))
    stopped_by(process, signal.SIGINT)
    logs = "".join(log.read_text() for log in (lab.home / "logs/trial").iterdir())
    assert logs.count("resumed at step ") >= 1 and lab.registry.models.numbers("start") == [1]


@pytest.mark.check
def test_a_signal_while_models_are_measured_ends_all_and_keeps_what_is_measured(lab, path, start):
    # All 954,305 responses to each prompt: a second for each model.
    words = ["seeds=[0]", "sweep.dpo.beta=[.1]", "compare.max_new_tokens=4", "compare.max_prompts=4"]
    process = start(lab.home, *words)
    wait_for(lambda: any(path.stat().st_size for path in lab.home.glob("cache/measured-*.json")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err and children.gone("JOBS_TEST", str(lab.home), 5)
    assert not (lab.home / "reports/trial/results.json").exists()
    kept = {path: path.read_bytes() for path in lab.home.glob("cache/measured-*.json") if path.stat().st_size}
    assert main(["run", str(path), "--home", str(lab.home), *words]) == 0  # one after another now
    assert kept and all(path.read_bytes() == content for path, content in kept.items())
    assert (lab.home / "reports/trial/results.json").exists()


@pytest.mark.check
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_nothing_is_left_of_a_parent_that_was_killed(lab, start):
    process = start(lab.home, *LONG)
    wait_for(lambda: two_are_training(lab.home))
    assert len(children.processes("JOBS_TEST", str(lab.home))) == 3
    process.kill()
    process.wait()
    assert children.gone("JOBS_TEST", str(lab.home), 5)


def test_what_a_node_sees_of_a_lock(tmp_path):
    path = tmp_path / "lock"
    assert _sees(str(path)) == "missing"
    path.touch()
    assert _sees(str(path)) == "free"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _sees(str(path)) == "locked"


def test_without_ray_it_says_how_to_install_it(lab, path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", str(path), "--home", str(lab.home), "--executor", "ray"]) == 2
    assert "pip install 'rlhf-pipeline[ray]'" in capsys.readouterr().err
    assert not (lab.home / "models/start").exists()


def test_a_node_of_a_cluster_ends_its_worker_with_the_run(monkeypatch, tmp_path):
    """The actor of a run without Ray: a worker that answers one job and then waits for a line."""
    program = (
        "import os, sys; job = sys.stdin.readline(); "
        'os.write(int(sys.argv[1]), b\'{"model": "dpo@v1", "text": "\' + job.strip().encode() + b\'"}\\n\'); '
        "sys.exit(sys.stdin.readline() != '\\n')"
    )
    monkeypatch.setattr("rlhf_pipeline.experiment.workers.calling_main", lambda module: program)
    monkeypatch.chdir(tmp_path)
    node = _Node({}, list(sys.path), str(tmp_path))
    assert Answer.read(node.run("a job\n")) == Answer("dpo@v1", text="a job")
    assert node._worker.process.returncode == 0 and node._worker.answers.closed


SMALL = ["seeds=[0]", "compare=null", "ppo.max_steps=1", "dpo.max_steps=1", "scorer.max_steps=1"]


@pytest.mark.check
def test_on_a_ray_cluster(lab, tiny, path, tmp_path, capfd):
    """A cluster of this machine: the same models and numbers as one after another."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'rlhf-pipeline[ray]'")
    there = tiny.copy(tmp_path / "there")
    words = ["run", str(path), *SMALL, "--home"]
    assert main([*words, str(lab.home)]) == 0
    assert main([*words, str(there.home), "--jobs", "2", "--executor", "ray"]) == 0
    assert ": done in " in capfd.readouterr().err
    for label in ("start@v1", "scorer@v1", "ppo@v1", "dpo@v1", "dpo@v2"):
        assert there.registry.resolve(label).digest == lab.registry.resolve(label).digest
    assert main([*words, str(there.home), "scorer.learning_rate=1e30", "--jobs", "2", "--executor", "ray"]) == 1
    assert "1 failed, 1 not started because they need one that failed" in capfd.readouterr().err


@pytest.mark.check
def test_faults_of_inputs_that_only_a_stage_finds(lab, tmp_path):
    """From Python too; the error is that of bad input."""
    schedule = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 1, "decay_type": "sideways"},
    }
    dpo = {**CONTENT["stages"]["dpo"], **schedule, "model_name_or_path": "sft"}
    content = {"name": "trial", "stages": {"dpo": dpo, "more": {**dpo, "model_name_or_path": "dpo"}}}
    with pytest.raises(BadInput, match=r"^dpo: lr_scheduler_kwargs: transformers refuses .*sideways"):
        run_experiment(content, [], lab.home, jobs=2, quiet=True)


def test_a_signal_within_another_output_stops_the_workers_all_the_same() -> None:
    """Python refuses to write to a stream in a handler while the interrupted code writes to it."""

    def refused(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    crew = SimpleNamespace(stopped_by=None, busy=[0, 1])
    crew.stop = lambda number: setattr(crew, "stopped_by", number)
    with jobs._stopping(crew, refused):
        signal.raise_signal(signal.SIGTERM)
    assert crew.stopped_by == signal.SIGTERM
