"""Several processes for one stage: what the parent makes of their results, errors, deaths and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_pipeline.errors import BadInput, Interrupted, ProcessFailed, RunFailed, faults_of
from rlhf_pipeline.experiment import launch
from rlhf_pipeline.experiment.work import of_processes

RESULT = {"stage": "dpo", "model": "dpo@v1", "path": "p", "run": "r", "metrics": {}, "cost": {}, "stopped_by": None}
BAD = {"code": 2, "kind": "config", "message": "a: bad", "elsewhere": False}
BAD["faults"] = [{"where": "a", "found": "bad", "expected": "good", "fix": "mend it", "key": "a"}]
ECHO = {"code": 1, "kind": "run", "message": "see the other", "elsewhere": True, "faults": []}
BROKEN = {"code": 1, "kind": "unexpected", "message": "connection closed", "elsewhere": False, "faults": []}
STOPPED = {"code": 143, "kind": "interrupted", "message": "stopped at step 3", "elsewhere": False, "faults": []}

# A process without torch: it has a job, its rank, and a way to answer.
START = """
import json, os, signal, sys, time
rank, job = int(os.environ["RANK"]), json.loads(sys.stdin.readline())
def answer(**what):
    os.write(int(sys.argv[1]), (json.dumps(what) + "\\n").encode())
"""


@pytest.fixture
def play(monkeypatch):
    """Let both processes run a program in place of a stage; returns what the parent returns."""
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def run(program: str, count: int = 2, grace: float = 20.0):
        monkeypatch.setattr(launch, "_PROGRAM", START + program)
        monkeypatch.setattr(launch, "GRACE", grace)
        config = SimpleNamespace(model_dump=lambda mode: {"beta": 0.5})
        return launch.run_in_processes("dpo", config, Path("home"), count=count)

    return run


def test_the_result_is_that_of_the_first_process(play, tmp_path):
    note = tmp_path / "seen"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    found = play(
        f"seen = [job, [os.environ[name] for name in {names}]]\n"
        f"open({str(note)!r} + str(rank), 'w').write(json.dumps(seen))\n"
        f"answer(result={RESULT} if rank == 0 else dict({RESULT}, model=''))"
    )
    assert found.model == "dpo@v1"
    threads = str(launch.threads_each(2))
    for rank in "01":
        job, variables = json.loads(Path(f"{note}{rank}").read_text())
        assert (job["stage"], job["config"], job["home"]) == ("dpo", {"beta": 0.5}, "home")
        assert variables == [rank, rank, "2", "2", "127.0.0.1", threads]


def test_a_mistake_that_all_processes_find_is_one_error(play):
    with pytest.raises(ProcessFailed, match="a: bad") as caught:
        play(f"answer(failure={BAD})")
    assert (caught.value.exit_code, caught.value.kind) == (2, "config")
    assert [fault.as_dict() for fault in faults_of(caught.value)] == [
        {"where": "", "key": "a", "found": "bad", "expected": "good", "fix": "mend it"}
    ]


@pytest.mark.parametrize("follows", [ECHO, BROKEN], ids=["echo", "lost peer"])
def test_the_cause_is_told_not_what_follows_from_it(play, follows):
    with pytest.raises(ProcessFailed, match="a: bad"):
        play(f"answer(failure={follows} if rank == 0 else {BAD})")


def test_a_killed_process_ends_the_others(play):
    """The first process waits for the second for ever, as NCCL may."""
    began = time.monotonic()
    with pytest.raises(
        RunFailed, match=r"process 1 of 2 was killed by signal 9 \(SIGKILL\), as the system does if mem"
    ):
        play("time.sleep(60) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)", grace=0.2)
    assert time.monotonic() - began < 30


def test_a_killed_process_is_the_cause_of_a_lost_connection(play):
    with pytest.raises(RunFailed, match="process 1 of 2 was killed"):
        play(f"answer(failure={BROKEN}) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)")


def test_a_process_without_an_answer_tells_its_last_lines(play):
    with pytest.raises(RunFailed, match=r"process 1 of 2 ended with exit code 3; .*\n  the last line"):
        play(f"if rank: print('the last line', file=sys.stderr); sys.exit(3)\nanswer(result={RESULT})")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_once(play, tmp_path, number):
    note = str(tmp_path / "got")
    program = (
        f"note = {note!r} + str(rank)\n"
        f"got = lambda number, _: (open(note, 'a').write('x'), answer(failure={STOPPED}), os._exit(0))\n"
        f"signal.signal({int(number)}, got)\nopen({note!r} + f'-ready-{{rank}}', 'w')\ntime.sleep(60)"
    )

    def send() -> None:
        while not all(Path(f"{note}-ready-{rank}").exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT)  # a shell lets what it starts in the background ignore it
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Interrupted, match="stopped at step 3") as caught:
        play(program)
    assert caught.value.exit_code == 143
    assert [Path(note + rank).read_text() for rank in "01"] == ["x", "x"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_the_stage_has_begun(play, tmp_path):
    def send() -> None:
        while not (tmp_path / "1").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Interrupted, match="stopped by signal 15") as caught:
        play(f"open({str(tmp_path)!r} + f'/{{rank}}', 'w'); time.sleep(60)")
    assert caught.value.exit_code == 143


def test_a_signal_while_processes_are_started_reaches_those_that_start_later(monkeypatch):
    """It comes while the second of four is made: the handler knows the first one only."""
    monkeypatch.delenv("RANK", raising=False)
    got: dict[int, list[int]] = {}

    class Made:
        def __init__(self, number, variables, said):
            self.process = SimpleNamespace(send_signal=got.setdefault(number, []).append)
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        give = staticmethod(lambda line: None)
        kill = close = staticmethod(lambda: None)

    monkeypatch.setattr(launch, "Rank", Made)
    monkeypatch.setattr(launch, "_wait", lambda ranks, ended: None)
    monkeypatch.setattr(launch, "_outcome", lambda ended, signals: signals)
    config = SimpleNamespace(model_dump=lambda mode: {})
    assert launch.run_in_processes("dpo", config, Path("home"), count=4) == [signal.SIGTERM]
    assert got == {rank: [signal.SIGTERM] for rank in range(4)}


def test_a_signal_after_the_answer_is_not_lost(play, tmp_path):
    """The stage is done; whatever would come after it does not."""

    def send() -> None:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    found = play(
        f"signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\nanswer(result={RESULT})\n"
        f"open({str(tmp_path)!r} + f'/{{rank}}', 'w')\ntime.sleep(60)"
    )
    assert (found.model, found.stopped_by) == ("dpo@v1", signal.SIGTERM)


def test_under_a_launcher_it_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadInput, match="--num-processes: found 2 under a launcher"):
        launch.run_in_processes("dpo", SimpleNamespace(), Path("home"), count=2)


@pytest.mark.check
def test_no_process_outlives_a_killed_parent(tmp_path):
    program = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from rlhf_pipeline.experiment import launch
launch._PROGRAM = '''
import os, sys, time
from rlhf_pipeline.cli import rank
def work(job):
    with open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
rank._work = work
rank.main(int(sys.argv[1]))
'''
launch.run_in_processes("dpo", SimpleNamespace(model_dump=lambda mode: {{}}), Path("home"), count=2)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    files = [tmp_path / rank for rank in "01"]
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{file.read_text()}").exists() for file in files):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.check
def test_the_dry_run_counts_the_steps_of_several_processes(lab):
    """Windows of 8 pairs in one process, of 16 in two."""
    from rlhf_pipeline.experiment.estimate import estimate_stage

    config = lab.config("dpo", max_steps=None, num_train_epochs=1)
    rows = estimate_stage(config, lab.home)["rows"]
    steps = [estimate_stage(config, lab.home, processes=count)["optimizer_steps"] for count in (1, 2)]
    assert steps == [-(-rows // 8), -(-rows // 16)]
    with pytest.raises(BadInput, match="a minibatch of 8 responses on 3 processes"):
        of_processes(lab.config("ppo"), 3)
