"""Runs on a Ray cluster: each run is a Ray actor that asks for its cores and its GPU and starts a worker process there.

The home is on a file system that all nodes share, under one path, and so are the package, the configs and the data.
Versions and runs are claimed under file locks, so `RayCrew` first checks that every node sees the locks of the others.
"""

from __future__ import annotations

import fcntl
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.disk.storage import lock
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.experiment.workers import Answer, Job, Worker

MISSING = "pip install 'rlhf-pipeline[ray]'"
POLL = 0.5
"""Seconds between two looks for a signal while all runs are busy."""


class _Node:
    """The actor of one run: a worker process on its node, which can be sent a signal while it works."""

    def __init__(self, variables: dict[str, str], path: list[str], folder: str):
        sys.path[:] = path
        os.chdir(folder)
        self._worker = Worker(variables)

    def run(self, line: str) -> str:
        """Run a job, given and answered as a line."""
        self._worker.give(line)
        answer = self._worker.answer()
        if not answer.code:
            self._worker.give("\n")
            self._worker.close()
        return answer.line()

    def send(self, number: int) -> None:
        """Send a signal to the process."""
        self._worker.send(number)

    def ready(self) -> None:
        """Return at once: the actor has found its place."""


@dataclass(frozen=True)
class _Running:
    """A job with its actor. ready: Ray's reference to the answer of `ready`."""

    key: int
    actor: Any
    ready: Any


def _sees(path: str) -> str:
    """What a node sees of a locked file: `locked`, `free` (it does not see the lock), or `missing`."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return "missing"
    try:
        lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "locked"
    finally:
        os.close(handle)
    return "free"


class RayCrew:
    """Up to `size` runs at a time on a Ray cluster; used like a `Crew`.

    The cluster is that of RAY_ADDRESS, else one that runs on this machine, else a new one on this machine.

    Raises:
        BadInput: ray is not installed, or a node does not share the home or its locks.
    """

    def __init__(self, size: int, home: Path):
        try:
            import ray
        except ImportError:
            raise BadInput(f"--executor ray: found no package ray; expected it installed; {MISSING}") from None
        self._ray, self.size = ray, size
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
        self._require_locks(home)
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = int(max(resources.get("CPU", 1) for resources in alive))
        total = int(sum(resources.get("CPU", 0) for resources in alive))
        self.threads: int | None = min(most, max(1, total // size))
        self._gpus = any(resources.get("GPU", 0) for resources in alive)
        self._running: dict[Any, _Running] = {}  # by Ray's reference to the answer
        self.stopped_by: int | None = None
        self._told = False

    def _require_locks(self, home: Path) -> None:
        ray, path = self._ray, home.absolute() / f".lock-{uuid.uuid4().hex[:12]}.tmp"
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                if not lock(file.fileno(), fcntl.LOCK_EX):
                    raise BadInput(f"--executor ray: the file system of {home} has no locks; expected flock")
                look = ray.remote(_sees)
                seen = {}
                for node in ray.nodes():
                    if node["Alive"]:
                        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                        seen[node["NodeManagerAddress"]] = look.options(num_cpus=0, scheduling_strategy=there).remote(
                            str(path)
                        )
                found = dict(zip(seen, ray.get(list(seen.values())), strict=True))
            finally:
                path.unlink(missing_ok=True)
        told = {"missing": f"does not see {home.absolute()}", "free": f"does not see the locks of {home.absolute()}"}
        if bad := [f"{address} {told[what]}" for address, what in found.items() if what != "locked"]:
            fix = "put the home on a file system that all nodes share, with locks (NFS 4, or Lustre with -o flock)"
            raise BadInput(f"--executor ray: node {', '.join(bad)}; expected a shared home; {fix}")

    @property
    def busy(self) -> list[int]:
        """The keys of the jobs that run, or wait for a node."""
        return [one.key for one in self._running.values()]

    @property
    def free(self) -> bool:
        """Whether a further job may be given."""
        return len(self._running) < self.size

    def hire(self, count: int) -> None:
        """Do nothing: each run has an actor of its own, so that the cluster can use its cores for others afterwards."""

    def give(self, key: int, job: Job) -> None:
        """Start the actor of a job as soon as a node has its cores, and its GPU unless `use_cpu` is set."""
        threads = job.config.get("num_threads") or self.threads
        gpus = 1 if self._gpus and not job.config.get("use_cpu") else 0
        actor = self._ray.remote(_Node).options(num_cpus=threads, num_gpus=gpus, max_concurrency=2)
        started = actor.remote({"OMP_NUM_THREADS": str(threads)}, list(map(str, sys.path)), os.getcwd())
        self._running[started.run.remote(job.line())] = _Running(key, started, started.ready.remote())

    def next_answer(self) -> tuple[int, Answer]:
        """Wait until a job has ended; return its key and the answer."""
        ray = self._ray
        ended: list[Any] = []
        while not ended:
            ended, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL)
            if self.stopped_by is not None and not self._told:
                self._stop_all(self.stopped_by)
        one = self._running.pop(ended[0])
        try:
            answer = Answer.read(ray.get(ended[0]))
        except ray.exceptions.RayError as error:
            first, *_ = str(error).strip().split("\n")
            answer = Answer(code=1 if self.stopped_by is None else 128 + self.stopped_by, text=f"lost by Ray: {first}")
        ray.kill(one.actor)
        return one.key, answer

    def stop(self, number: int) -> None:
        """Have `next_answer` send a signal to all runs: a handler of signals, which calls this, must not call Ray."""
        self.stopped_by = number

    def _stop_all(self, number: int) -> None:
        """Send a signal to all runs; those that still wait for a node are given up."""
        self._told = True
        for one in self._running.values():
            placed, _ = self._ray.wait([one.ready], timeout=0)
            if placed:
                one.actor.send.remote(number)
            else:
                self._ray.kill(one.actor)

    def kill(self) -> None:
        """Do nothing: Ray kills the runs of a process that has ended."""

    def dismiss(self) -> None:
        """Kill what still runs, and leave the cluster."""
        for one in self._running.values():
            self._ray.kill(one.actor)
        self._ray.shutdown()
