"""Several processes for one stage: `rlhf STAGE --num-processes N`.

Each process runs the whole stage as one rank, with the variables that torchrun sets. It is a new Python process that
leads a session of its own, so Ctrl-C reaches only the parent, which passes the signal on once. torchrun is not used: it
kills its processes 30 seconds after a signal, and an update and its checkpoint may take longer.

The standard input of a process is a pipe from the parent: it brings the job, and it ends if the parent dies in any way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from tempfile import TemporaryDirectory
from typing import IO, Any

from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.errors import BadInput, Interrupted, ProcessFailed, RunFailed
from rlhf_pipeline.experiment.workers import threads_each
from rlhf_pipeline.stages.result import StageResult

GRACE = 15.0
"""Seconds in which the other processes can end by themselves after one has failed."""
# The parent's import path: a process finds the same modules. A signal while they are imported ends it silently.
_START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); sys.path[:] = sys.argv[2:]; "
    "from rlhf_pipeline.cli.rank import main; main(int(sys.argv[1]))"
)


@dataclass
class Rank:
    """A process of a stage, as its parent sees it.

    answers: the pipe that its answer comes from. said: its standard error, if it is not that of the parent.
    answer: {"result": ...} or {"failure": ...}; None if there is none (yet). killed: whether the parent has killed it.
    """

    number: int
    process: subprocess.Popen[str]
    answers: IO[str]
    said: Path | None
    answer: dict[str, Any] | None = None
    killed: bool = False

    @property
    def failure(self) -> dict[str, Any] | None:
        return (self.answer or {}).get("failure")

    def kill(self) -> None:
        """Kill the process and its children, unless it has ended."""
        if self.process.poll() is None:
            self.killed = True
            os.killpg(self.process.pid, signal.SIGKILL)


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
                ranks.append(_start(number, line, variables, said))
            if signals:  # a process that started later did not get it
                _send(ranks[-1:], signals[0])
            _wait(ranks, ended)
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                _close(rank)
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


def _start(number: int, line: str, variables: Mapping[str, str], said: Path | None) -> Rank:
    """Start a process and give it its job."""
    reading, writing = os.pipe()
    stderr = None if said is None else said.open("w")
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(writing), *map(str, sys.path)],
            stdin=subprocess.PIPE,
            stdout=2 if stderr is None else stderr,  # standard output carries the result of the parent's command
            stderr=stderr,
            pass_fds=(writing,),
            start_new_session=True,
            env={**variables, "RANK": str(number), "LOCAL_RANK": str(number)},
            text=True,
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
        if stderr is not None:
            stderr.close()
    assert process.stdin is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:  # it has died already: its end is seen later
        pass
    return Rank(number, process, os.fdopen(reading), said)


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


def _close(rank: Rank) -> None:
    """Wait for the end of a process, and close its pipes."""
    rank.process.wait()
    assert rank.process.stdin is not None
    with suppress(BrokenPipeError):
        rank.process.stdin.close()
    rank.answers.close()


def _outcome(ended: Sequence[Rank], signals: Sequence[int]) -> StageResult:
    """The result of the first rank, or the error that caused the end of the run; see `run_in_processes`."""
    reports = [rank.failure for rank in ended if rank.failure is not None]
    dead = [rank for rank in ended if rank.answer is None and not rank.killed]
    if not reports and not dead:
        (result,) = (rank.answer["result"] for rank in ended if rank.number == 0 and rank.answer is not None)
        return StageResult(**result)
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
