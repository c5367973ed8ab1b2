"""Worker processes: each runs one stage after another, so that the libraries are imported once per worker.

Ctrl-C reaches only the parent, which passes the signal on. If the parent dies in any way, a worker kills its process
group.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Protocol, TypeVar

from rlhf_pipeline.data.processes import usable_cores
from rlhf_pipeline.experiment.child import Child, calling_main


@dataclass(frozen=True)
class Job:
    """One stage for a worker, or the measuring of what a comparison reads.

    config: the keys and values of its config. log: the file that gets all output. number: the version number that is
    reserved for the output of a stage. points: those of a comparison, as dictionaries; None: the arms of its config.
    """

    stage: str
    config: Mapping[str, Any]
    home: str
    log: str
    number: int | None = None
    resume: bool = True
    points: Sequence[Mapping[str, Any]] | None = None

    def line(self) -> str:
        """One line of JSON, as `read` reads it."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Job:
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Answer:
    """What became of a job.

    model: the label of what was made; empty after an error. seconds: its wall time by the cost bill. stopped_by: a
    signal that arrived when all updates were done. code: the exit code, 0 without an error. text: the error.
    """

    model: str = ""
    seconds: float | None = None
    stopped_by: int | None = None
    code: int = 0
    text: str = ""

    def line(self) -> str:
        """One line of JSON, as `read` reads it."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Answer:
        return cls(**json.loads(line))


class Worker(Child):
    """A worker process, as its parent sees it. variables: of its environment, besides those of the parent."""

    def __init__(self, variables: Mapping[str, str]):
        super().__init__(calling_main("rlhf_pipeline.cli.worker"), {**os.environ, **variables})

    def answer(self) -> Answer:
        """Wait for the answer to a job; a worker with an error has ended afterwards."""
        line = self.answers.readline()
        answer = Answer.read(line) if line.endswith("\n") else None
        if answer is not None and not answer.code:
            return answer
        code = self.process.wait()
        self.close()
        return answer or Answer(code=code if code > 0 else 128 - code, text=_told(code))

    def send(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        self.process.send_signal(number)


def _told(code: int) -> str:
    """What is known of a worker that ended without an answer."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    memory = "; if the system ran out of memory, use fewer --jobs or smaller batches" if -code == signal.SIGKILL else ""
    return f"its process was killed by signal {-code} ({name}){memory}"


class Team(Protocol):
    """What runs jobs, up to `size` at a time.

    threads: those of each job; None: as OMP_NUM_THREADS says. busy: the keys of the jobs that run now. free: whether a
    further job may be given. stopped_by: the signal that was passed on to the jobs.
    """

    size: int
    threads: int | None
    stopped_by: int | None

    @property
    def busy(self) -> list[int]: ...

    @property
    def free(self) -> bool: ...

    def hire(self, count: int) -> None: ...

    def give(self, key: int, job: Job) -> None: ...

    def next_answer(self) -> tuple[int, Answer]: ...

    def stop(self, number: int) -> None: ...

    def kill(self) -> None: ...

    def dismiss(self) -> None: ...


T = TypeVar("T", bound=Team)


class Crew:
    """Up to `size` workers on this machine."""

    def __init__(self, size: int, threads: int | None):
        self.size, self.threads = size, threads
        self._slots: list[Worker | None] = [None] * size
        self._busy: dict[int, int] = {}  # slot -> what it was given
        self.stopped_by: int | None = None

    @property
    def busy(self) -> list[int]:
        return list(self._busy.values())

    @property
    def free(self) -> bool:
        return len(self._busy) < self.size

    def hire(self, count: int) -> None:
        """Start workers up to this number, so that they import their libraries while others work."""
        for slot in range(min(count, self.size)):
            if self._slots[slot] is None:
                self._slots[slot] = Worker(self._variables(slot))

    def give(self, key: int, job: Job) -> None:
        """Give a job to a free worker; `key` names it in `next_answer`."""
        slots = [slot for slot in range(self.size) if slot not in self._busy]
        slot = next((slot for slot in slots if self._slots[slot] is not None), slots[0])
        worker = self._slots[slot]
        if worker is None:
            worker = self._slots[slot] = Worker(self._variables(slot))
        self._busy[slot] = key
        worker.give(job.line())
        if self.stopped_by is not None:  # the signal arrived meanwhile
            worker.send(self.stopped_by)

    def next_answer(self) -> tuple[int, Answer]:
        """Wait until a job has ended; return its key and the answer."""
        with DefaultSelector() as selector:
            for slot in self._busy:
                selector.register(self._working(slot).answers, EVENT_READ, slot)
            (ready, _), *_ = selector.select()
        answer = self._working(ready.data).answer()
        if answer.code:
            self._slots[ready.data] = None
        return self._busy.pop(ready.data), answer

    def stop(self, number: int) -> None:
        """Send a signal to all workers that have a job; no further job should be given."""
        self.stopped_by = number
        for slot in list(self._busy):
            self._working(slot).send(number)

    def kill(self) -> None:
        """Kill all workers."""
        for worker in filter(None, self._slots):
            worker.kill()

    def dismiss(self) -> None:
        """End all workers: those without a job at once, the others by a kill."""
        for slot, worker in enumerate(self._slots):
            if worker is not None and slot in self._busy:
                worker.kill()
            elif worker is not None:
                worker.give("\n")
        for worker in filter(None, self._slots):
            worker.close()

    def _working(self, slot: int) -> Worker:
        worker = self._slots[slot]
        assert worker is not None
        return worker

    def _variables(self, slot: int) -> dict[str, str]:
        """Variables that divide threads and GPUs between the workers."""
        variables = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        devices = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        if len(devices) > 1:
            variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return variables


def threads_each(jobs: int) -> int | None:
    """The threads of each of `jobs` workers: usable cores // jobs, at least 1; None if OMP_NUM_THREADS is set."""
    if os.environ.get("OMP_NUM_THREADS"):
        return None
    return max(1, usable_cores() // jobs)


@contextmanager
def hired(crew: T) -> Iterator[T]:
    """Dismiss a crew at the end."""
    try:
        yield crew
    finally:
        crew.dismiss()
