"""Runs that are killed or stopped, and what the same command makes of them afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_pipeline.registry.repair import registry_faults
from tests.faults import children, subjects
from tests.faults.subjects import Subject

AGAIN = 0.2
"""Share of the trials in which the resumed run is killed as well."""


def torn(home: Path) -> list[str]:
    """Versions that are there but not whole."""
    from rlhf_pipeline.registry.store import Registry

    return [str(fault) for fault in registry_faults(Registry(home))]


def finished(subject: Subject, home: Path) -> bool:
    """Whether a stage's run has ended, its model registered and its folder closed, before it was killed."""
    states = [json.loads(path.read_text())["status"] for path in home.glob("runs/*/run.json")]
    return subject.name != subjects.EXPERIMENT and states == ["finished"]


def judge(subject: Subject, home: Path, outcome: children.Outcome) -> list[str]:
    """What is wrong with a home whose run was disturbed and then went on to its end."""
    faults = [f"not resumed: exit code {outcome.code}: {outcome.err[-500:]}"] if outcome.code != 0 else []
    faults += [f"torn: {fault}" for fault in torn(home)]
    found = subjects.digests(home)
    if outcome.code == 0 and found != subject.left:
        places = sorted({*found, *subject.left})
        faults += [f"differs: {place}" for place in places if found.get(place) != subject.left.get(place)]
    leftovers = [path for path in home.rglob(".*.tmp") if "/cache/" not in str(path)]
    if outcome.code == 0 and leftovers:
        faults.append(f"left over: {', '.join(str(path.relative_to(home)) for path in leftovers)}")
    if subject.name == subjects.EXPERIMENT and outcome.code == 0 and subjects.compared(home) is None:
        faults.append("no comparison")
    return faults


def kill(subject: Subject, folder: Path, draw: Any, *, process: str = "forked") -> dict[str, Any]:
    """One trial: kill, look at what is there, resume (sometimes killed again), compare with the undisturbed run."""
    home = subject.home(folder / "home")
    said = folder / "said"
    by_act = process == "forked" and draw.random() < 0.5
    trial: dict[str, Any] = {"subject": subject.name, "process": process, "kills": [], "faults": []}
    while True:
        if by_act:
            number = draw.randint(1, subject.acts)
            outcome = children.run(subject.command(home), said, before=children.die_at(home, number))
            where = f"act {number} of {subject.acts}"
        else:
            start = children.fork if process == "forked" else children.fresh
            seconds = draw.uniform(0, 1) * subject.seconds
            if process == "fresh":
                seconds += draw.uniform(2, 3)  # it has to import first
            outcome = children.kill_after(start(subject.command(home), said), seconds)
            where = f"{seconds:.3f} s of {subject.seconds:.3f}"
        hit = outcome.killed_by == signal.SIGKILL
        trial["kills"].append({"where": where, "hit": hit})
        trial["faults"] += [f"torn after the kill at {where}: {fault}" for fault in torn(home)]
        if not hit or draw.random() >= AGAIN or finished(subject, home):  # again would begin a second version
            break
    if outcome.code != 0 and not finished(subject, home):  # otherwise the same command would begin a second version
        outcome = children.run(subject.command(home), said)
    trial["faults"] += judge(subject, home, outcome if not finished(subject, home) else replace(outcome, code=0))
    if not trial["faults"]:
        shutil.rmtree(folder)
    return trial


def kills(found: Sequence[Subject], folder: Path, *, count: int, fresh: int = 0, seed: int = 0) -> dict[str, Any]:
    """SIGKILL at `count` random points, in turn over the subjects, and `fresh` more in processes of their own."""
    trials = []
    for number in range(count + fresh):
        subject = found[number % len(found)]
        draw = children.draws(seed, f"kill {number}")
        process = "forked" if number < count else "fresh"
        trials.append(kill(subject, folder / f"kill-{number}", draw, process=process))
    return {
        "trials": len(trials),
        "hits": sum(kill["hit"] for trial in trials for kill in trial["kills"]),
        "in_fresh_processes": fresh,
        "failed": [trial for trial in trials if trial["faults"]],
    }


def signal_at(step: int, number: int = signal.SIGTERM):
    """A trap: the child sends itself a signal while it logs an update."""

    def install() -> None:
        from rlhf_pipeline.training.tracking import RunLog

        update = RunLog.update

        def updated(self: Any, at: int, *arguments: Any) -> None:
            if at == step:
                os.kill(os.getpid(), number)
            update(self, at, *arguments)

        RunLog.update = updated  # type: ignore[method-assign]

    return install


def _stop(subject: Subject, folder: Path, stopped: Sequence[int], process: str = "forked") -> dict[str, Any]:
    """One trial: a run that is stopped at some steps and resumed each time."""
    where = folder / f"stop-{process}-{subject.name}-{stopped[0]}-{len(stopped)}"
    home = subject.home(where / "home")
    said, words, faults = where / "said", subject.command(home), []
    for step in stopped:
        if process == "fresh":
            outcome = children.fresh(words, said, trap=("signal_at", str(step))).wait()
        else:
            outcome = children.run(words, said, before=signal_at(step))
        if outcome.code != 143:
            faults.append(f"stopped at {step}: exit code {outcome.code}, killed by {outcome.killed_by}")
    start = children.fresh if process == "fresh" else children.fork
    faults += judge(subject, home, start(words, said).wait())
    if not faults:
        shutil.rmtree(where)
    return {"subject": subject.name, "process": process, "stopped": list(stopped), "faults": faults}


def stops(found: Sequence[Subject], folder: Path, *, steps: int, fresh: int = 0, seed: int = 0) -> dict[str, Any]:
    """Stop each stage at every step and resume it: once at each, and one run that is stopped at all of them.

    fresh: more trials, at random steps, in processes of their own.
    """
    every = list(range(1, steps + 1))
    trials = [_stop(subject, folder, steps) for subject in found for steps in [*[[step] for step in every], every]]
    for number in range(fresh):
        step = children.draws(seed, f"stop {number}").choice(every)
        trials.append(_stop(found[number % len(found)], folder / str(number), [step], "fresh"))
    return {"trials": len(trials), "failed": [trial for trial in trials if trial["faults"]]}


def checkpoints(home: Path) -> list[Path]:
    """The intact checkpoints of the runs of a home."""
    from rlhf_pipeline.errors import DamagedFile
    from rlhf_pipeline.training.checkpoint import verify_checkpoint

    intact = []
    for path in sorted(home.glob("runs/*/checkpoints/step-*")):
        try:
            intact.append(verify_checkpoint(path).directory)
        except DamagedFile:
            continue
    return intact


def terminate(found: Sequence[Subject], folder: Path, *, count: int, fresh: int = 0, seed: int = 0) -> dict[str, Any]:
    """SIGTERM at random moments of training: how many left a checkpoint and exit code 143, and the longest wait.

    The moment is drawn among the updates and, within one, in time: the signal comes from outside, a random part of
    an update's time after the log has its line.
    """
    import threading
    import time

    trials = []
    for number in range(count + fresh):
        subject = found[number % len(found)]
        draw = children.draws(seed, f"terminate {number}")
        where = folder / f"terminate-{number}"
        home = subject.home(where / "home")
        start = children.fork if number < count else children.fresh
        child = start(subject.command(home), where / "said")
        rows = draw.randint(1, 2)
        part = draw.uniform(0, 2)
        ended = threading.Event()
        while not ended.wait(0.001):  # looks for the line of an update
            lines = sum(path.read_bytes().count(b"\n") for path in home.glob("runs/*/metrics.jsonl"))
            if lines >= rows or child.ended():
                break
        ended.wait(part)
        sent = time.perf_counter()
        child.send(signal.SIGTERM)
        outcome = child.wait(sent=sent)
        faults = [] if outcome.code == 143 else [f"exit code {outcome.code}, killed by {outcome.killed_by}"]
        faults += [] if checkpoints(home) else ["no checkpoint"]
        late = outcome.late or 0.0
        faults += [f"took {late:.1f} s"] if late > 5 else []
        trials.append({"subject": subject.name, "late": late, "faults": faults})
        if not faults:
            shutil.rmtree(where)
    return {
        "trials": len(trials),
        "in_fresh_processes": fresh,
        "longest_wait_seconds": max(trial["late"] for trial in trials),
        "failed": [trial for trial in trials if trial["faults"]],
    }
