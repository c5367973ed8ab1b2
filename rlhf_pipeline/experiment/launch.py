"""Several processes for one stage: `rlhf STAGE --num-processes N`.

Each process runs the whole stage as one rank, with the variables that torchrun sets. Ctrl-C reaches only the parent,
which passes the signal on once. torchrun is not used: it kills its processes 30 seconds after a signal, and an update
and its checkpoint may take longer.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.errors import BadInput, Interrupted, ProcessFailed, RunFailed
from rlhf_pipeline.experiment.child import Child, calling_main
from rlhf_pipeline.experiment.workers import threads_each
from rlhf_pipeline.stages.result import StageResult

GRACE = 15.0
"""Seconds in which the other processes can end by themselves after one has failed."""
# A signal that arrives while a process imports its modules ends it silently.
_PROGRAM = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); " + calling_main("rlhf_pipeline.cli.rank")


class Rank(Child):
    """A process of a stage, as its parent sees it.

    said: the file with its output, if that does not go to the parent's standard error.
    answer: {"result": ...} or {"failure": ...}; None if there is none (yet).
    """

    def __init__(self, number: int, variables: Mapping[str, str], said: Path | None):
        environment = {**variables, "RANK": str(number), "LOCAL_RANK": str(number)}
        super().__init__(_PROGRAM, environment, said)
        self.number, self.said = number, said
        self.answer: dict[str, Any] | None = None

    @property
    def failure(self) -> dict[str, Any] | None:
        return (self.answer or {}).get("failure")


def run_in_processes(
    stage: str,
    config: StageConfig,
    home: Path,
    *,
    count: int,
    resume: bool = True,
    quiet: bool = False,
    notes: Sequence[str] = (),
    number: int | None = None,
    debug: bool = False,
) -> StageResult:
    """Run a stage in `count` processes of this machine; returns what the first of them returns.

    Args:
        number: the version number that is reserved for the model.
        debug: show the standard error of all processes, and their tracebacks; else that of the first one only.

    Raises:
        BadInput: this process was itself started by a launcher.
        ProcessFailed: the error of the process that failed first. RunFailed: a process died without an error.
        Interrupted: a signal stopped the run.
    """
    if "RANK" in os.environ:
        raise BadInput(
            f"--num-processes: found {count} under a launcher (RANK is {os.environ['RANK']}); "
            "leave it out, or start the command without torchrun or accelerate launch"
        )
    job = {"stage": stage, "config": config.model_dump(mode="json"), "home": str(home), "debug": debug}
    job["options"] = {"resume": resume, "quiet": quiet, "notes": list(notes), "number": number}
    line = json.dumps(job) + "\n"
    ranks: list[Rank] = []
    ended: list[Rank] = []
    with TemporaryDirectory(prefix="rlhf-") as folder, _passing_on(ranks) as signals:
        variables = _shared_variables(count)
        try:
            for number in range(count):
                said = Path(folder) / f"{number}.txt" if number and not debug else None
                ranks.append(Rank(number, variables, said))
                ranks[-1].give(line)
                if signals:  # a process that started later did not get it
                    _send(ranks[-1:], signals[0])
            _wait(ranks, ended)
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.close()
        return _outcome(ended, signals)


def _shared_variables(count: int) -> dict[str, str]:
    """The environment that all processes share: the group's address and size, as torchrun sets them, and threads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    threads = threads_each(count)
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **own}


@contextmanager
def _passing_on(ranks: Sequence[Rank]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to all processes; yields the list of the signals that have arrived."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def handle(number: int, _frame: Any) -> None:
        arrived.append(number)
        _send(ranks, number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        rank.process.send_signal(number)


def _wait(ranks: Sequence[Rank], ended: list[Rank]) -> None:
    """Wait for the answers of all processes; kill those that have none GRACE seconds after one has failed.

    ended: gets the processes in the order of their answers.
    """
    failed_at: float | None = None
    with DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.answers, EVENT_READ, rank)
        while selector.get_map():
            left = None if failed_at is None else max(0.0, failed_at + GRACE - time.monotonic())
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)
                rank = key.data
                line = rank.answers.readline()
                rank.answer = json.loads(line) if line.endswith("\n") else None
                ended.append(rank)
                if failed_at is None and (rank.answer is None or rank.failure is not None):
                    failed_at = time.monotonic()
            if left == 0:
                for rank in ranks:
                    rank.kill()
    for rank in ranks:  # an answer is the last thing that a process does
        try:
            rank.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            rank.kill()


def _outcome(ended: Sequence[Rank], signals: Sequence[int]) -> StageResult:
    """The result of the first rank, or the error that caused the end of the run; see `run_in_processes`."""
    reports = [rank.failure for rank in ended if rank.failure is not None]
    dead = [rank for rank in ended if rank.answer is None and not rank.killed]
    if not reports and not dead:
        (result,) = (rank.answer["result"] for rank in ended if rank.number == 0 and rank.answer is not None)
        return StageResult(**{**result, "stopped_by": result["stopped_by"] or next(iter(signals), None)})
    if signals:
        for report in reports:
            if report["kind"] == "interrupted":
                raise Interrupted(report["message"], report["code"] - 128)
        if all(_ended_by_signal(rank) in signals for rank in dead) and dead:
            raise Interrupted(f"stopped by signal {signals[-1]}; run the same command again", signals[-1])
    named = [report for report in reports if not report["elsewhere"] and report["kind"] != "unexpected"]
    if not named and dead:  # the errors of the others follow from its end
        raise RunFailed(_told(dead[0], len(ended)))
    report = (named or [report for report in reports if not report["elsewhere"]] or reports)[0]
    raise ProcessFailed(report["message"], report["kind"], report["code"], report["faults"])


def _ended_by_signal(rank: Rank) -> int:
    """The signal that ended a process, also if it left by `os._exit(128 + number)`; else 0 or a negative number."""
    code = rank.process.wait()
    return -code if code < 0 else code - 128


def _told(rank: Rank, count: int) -> str:
    """Describe a process that died without an answer."""
    code = rank.process.wait()
    how = (
        f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code} ({signal.Signals(-code).name})"
    )
    memory = ", as the system does if memory runs out" if -code == signal.SIGKILL else ""
    text = f"process {rank.number} of {count} {how}{memory}; all processes of the run have ended; "
    text += "the same command resumes from the newest checkpoint, if there is one"
    last = [] if rank.said is None else rank.said.read_text(errors="replace").splitlines()[-5:]
    return "\n".join([text, *(f"  {line}" for line in last)])
