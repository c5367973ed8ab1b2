"""Run the nodes of an experiment in several processes at a time.

A failed run stops only the runs that need it. Version numbers do not depend on which run ends first: each run gets its
number before the first run starts, in the order of the nodes, and keeps it if it is started again.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.grid import Node
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.errors import BadInput, Interrupted, RunFailed
from rlhf_pipeline.experiment.done import find_done, output_of
from rlhf_pipeline.experiment.progress import Outcome, progress_at_once, urgency
from rlhf_pipeline.experiment.workers import Answer, Crew, Job, Team, threads_each
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.shelf import Shelf
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.training.tracking import say_in_handler

TAIL = 5
"""The number of lines of a failed run's log that are shown."""


def shelf_of(config: StageConfig, registry: Registry) -> Shelf:
    """The shelf that the output of a stage is published on."""
    return registry.data if config.stage == "collect" else registry.models


def reserved_number(config: StageConfig, registry: Registry) -> int | None:
    """The version number that is reserved for the output of a run; None if there is none."""
    return shelf_of(config, registry).reserved(config.output_name).get(config_digest(config))


def reserve_numbers(nodes: Sequence[Node], done: Sequence[Resolved | None], registry: Registry) -> dict[int, int]:
    """Reserve a version number for each node that is to run, in the order of the nodes."""
    outputs: dict[int, str] = {}
    numbers: dict[int, int] = {}
    for place, (node, found) in enumerate(zip(nodes, done, strict=True)):
        if found is not None:
            outputs[place] = output_of(node, found.label)
            continue
        config = node.resolved(outputs)  # its inputs have their numbers already
        numbers[place] = shelf_of(config, registry).reserve(config.output_name, config_digest(config))
        outputs[place] = output_of(node, f"{config.output_name}@v{numbers[place]}")
    return numbers


@dataclass
class _Runner:
    """The nodes of an experiment on their way through a crew of workers; all other nodes are named by their index.

    logs: the folder of the log files. waiting: the nodes that may still run, the most urgent first. started: when each
    running node started. failed: the answers of those that failed. lost: those that need a failed one.
    """

    nodes: Sequence[Node]
    done: Sequence[Resolved | None]
    registry: Registry
    crew: Team
    logs: Path
    resume: bool
    say: Callable[[str], None]
    when_idle: Callable[[Sequence[Outcome]], None]
    waiting: list[int] = field(init=False)
    numbers: Mapping[int, int] = field(init=False)
    outputs: dict[int, str] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    started: dict[int, float] = field(default_factory=dict)
    failed: dict[int, Answer] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        urgent = urgency([list(node.inputs.values()) for node in self.nodes])
        left = [place for place, found in enumerate(self.done) if found is None]
        self.waiting = sorted(left, key=lambda place: -urgent[place])
        self.numbers = reserve_numbers(self.nodes, self.done, self.registry)
        for place, found in enumerate(self.done):
            if found is not None:
                self.skip(place, found)

    def log(self, place: int) -> Path:
        """The log file of a node."""
        word = re.sub(r"[^A-Za-z0-9._=-]+", "_", self.nodes[place].label)[:100]
        return self.logs / f"{place + 1:0{len(str(len(self.nodes)))}}-{word}.txt"

    def tell(self, place: int, text: str) -> None:
        """Log a line about a node."""
        self.say(f"[{place + 1}/{len(self.nodes)}] {self.nodes[place].label}: {text}")

    def end(self, place: int, outcome: Outcome) -> None:
        """Note that a node is done."""
        self.outcomes[place] = outcome
        self.outputs[place] = output_of(outcome.node, outcome.model)

    def skip(self, place: int, found: Resolved) -> None:
        """Note a node that is done already."""
        cost = found.manifest.cost if found.manifest else {}
        self.end(place, Outcome(self.nodes[place], found.label, True, cost.get("wall_seconds")))
        self.tell(place, f"already done, {found.label}")

    def start_ready(self) -> None:
        """Give the free workers the most urgent nodes whose inputs exist."""
        for place in list(self.waiting):
            inputs = self.nodes[place].inputs.values()
            if any(one in self.failed or one in self.lost for one in inputs):
                self.waiting.remove(place)
                self.lost.append(place)
            elif self.crew.free and all(one in self.outputs for one in inputs):
                self.waiting.remove(place)
                self.start(place)

    def start(self, place: int) -> None:
        """Give a node to a worker, unless it is done already."""
        node = self.nodes[place]
        try:
            config = node.resolved(self.outputs)
            found = find_done(config, self.registry)  # its inputs were just made: it may be done
        except BadInput as error:
            self.fail(place, Answer(code=error.exit_code, text=str(error)))
            return
        if found is not None:
            self.skip(place, found)
            return
        values: dict[str, Any] = config.model_dump(mode="json")
        log, home = self.log(place), str(self.registry.home.absolute())
        job = Job(node.spec.stage, values, home, str(log), self.numbers[place], self.resume)
        self.started[place] = time.monotonic()
        self.tell(place, f"started; log {log}")
        self.crew.give(place, job)

    def fail(self, place: int, answer: Answer) -> None:
        """Note a node that has failed."""
        self.failed[place] = answer
        first, *_ = answer.text.split("\n")
        self.tell(place, f"failed: {first}")

    def finish_one(self) -> None:
        """Wait until a worker has ended its job, and note what became of the node."""
        place, answer = self.crew.next_answer()
        if place not in self.started:  # it has measured for the comparison
            return
        elapsed = time.monotonic() - self.started.pop(place)
        if answer.code >= 128 and self.crew.stopped_by is not None:
            self.tell(place, "stopped")
        elif answer.code:
            self.fail(place, answer)
        else:
            self.end(place, Outcome(self.nodes[place], answer.model, False, answer.seconds))
            self.tell(place, f"done in {elapsed:.0f} s, {answer.model} ({self.progress()})")

    def progress(self) -> str:
        """Finished runs and the time left."""
        now = time.monotonic()
        left = {place: max(now - since, 1e-9) for place, since in self.started.items()}
        left |= dict.fromkeys(self.waiting, 0.0)
        ended = [(outcome.node.name, outcome.skipped, outcome.seconds) for outcome in self.outcomes.values()]
        return progress_at_once(left, self.nodes, ended, self.crew.size)

    def run(self) -> list[Outcome]:
        """Run all nodes that can run."""
        crew = self.crew
        while self.waiting or self.started:
            if crew.stopped_by is None:
                self.start_ready()
            elif not self.started:
                break
            if self.started and not self.waiting and not self.failed and crew.free and crew.stopped_by is None:
                self.when_idle([self.outcomes[place] for place in sorted(self.outcomes)])
            if self.started:
                self.finish_one()
        if (number := crew.stopped_by) is not None:
            done = f"{len(self.outcomes)} of {len(self.nodes)} are done; the same command continues from here"
            raise Interrupted(f"stopped by signal {number}: {done}", number)
        if self.failed:
            self.raise_failures()
        return [self.outcomes[place] for place in range(len(self.nodes))]

    def raise_failures(self) -> None:
        """Show the end of each failed run's log.

        Raises:
            BadInput: all failures are faults of an input. RunFailed: some are not.
        """
        failed, lost, done = self.failed, self.lost, len(self.outcomes)
        needing = f", {len(lost)} not started because they need one that failed" if lost else ""
        self.say(f"{done} of {len(self.nodes)} are done, {len(failed)} failed{needing}")
        lines = []
        for place, answer in sorted(failed.items()):
            log, label = self.log(place), self.nodes[place].label
            if place in self.numbers and log.exists():
                self.say(f"{label}: the last lines of {log}:")
                for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]:
                    self.say(f"  {line}")
            lines += [f"{label}: {line}" for line in answer.text.split("\n")]
        if lost:
            self.say(f"not started: {', '.join(self.nodes[place].label for place in sorted(lost))}")
        bad = all(answer.code == BadInput.exit_code for answer in failed.values())
        raise (BadInput if bad else RunFailed)("\n".join(lines))


def run_at_once(
    nodes: Sequence[Node],
    done: Sequence[Resolved | None],
    registry: Registry,
    crew: Team,
    *,
    logs: Path,
    resume: bool,
    say: Callable[[str], None],
    when_idle: Callable[[Sequence[Outcome]], None],
) -> list[Outcome]:
    """Run the nodes that are not done in the workers of a crew, each after its inputs; return the outcomes of all.

    Args:
        logs: the folder of the logs, one for each run.
        when_idle: called, once or again, while the last runs leave a worker free, with what is done.

    Raises:
        BadInput, RunFailed: runs have failed; all runs that do not need them are done.
        Interrupted: a signal came; the runs have written checkpoints.
    """
    runner = _Runner(nodes, done, registry, crew, logs, resume, say, when_idle)
    count = len(runner.waiting)
    each = "OMP_NUM_THREADS" if crew.threads is None else _counted(crew.threads, "thread")
    say(f"{crew.size} runs at a time with {each} each (num_threads of a config comes first); logs in {logs}")
    logs.mkdir(parents=True, exist_ok=True)
    with _stopping(crew, say):
        crew.hire(count)
        return runner.run()


def team(executor: str, jobs: int, home: Path) -> Team:
    """Those who run up to `jobs` runs at a time: local (this machine) or ray (a cluster)."""
    if executor == "ray":
        from rlhf_pipeline.experiment.ray_crew import RayCrew

        return RayCrew(jobs, home)
    return Crew(jobs, threads_each(jobs))


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' if count != 1 else ''}"


@contextmanager
def _stopping(crew: Team, say: Callable[[str], None]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the workers, which write checkpoints; a second signal ends everything at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: Any) -> None:
        if crew.stopped_by is not None:
            crew.kill()
            os._exit(128 + number)
        crew.stop(number)
        runs = _counted(sum(key >= 0 for key in crew.busy), "run")
        say_in_handler(say, f"signal {number}: stopping {runs}, which write their checkpoints (repeat to stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
