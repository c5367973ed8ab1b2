"""`rlhf run --jobs 2` whose parent process is killed: what is left of it, and what the same command makes of that."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults import children, kills, subjects
from tests.faults.subjects import EXPERIMENT, Subject

MARK = "RLHF_FAULTS_HOME"
"""Variable of the environment by which the workers of a home are found."""
WITHIN = 5.0
"""Seconds in which the workers of a dead parent must be gone."""


def make_subject(folder: Path, seeds: Sequence[int] = (0, 1)) -> Subject:
    """An experiment with some seeds and two betas of DPO, and what it leaves when its runs come one after another.

    Raises:
        RuntimeError: an undisturbed run failed.
    """
    path = subjects.experiment_files(folder / "experiment", 5, seeds=[*seeds], sweep={"dpo.beta": [0.1, 0.5]})
    empty = folder / "empty"
    empty.mkdir(parents=True)
    in_order = Subject(EXPERIMENT, empty, ("run", str(path)))
    home = in_order.home(folder / "in-order")
    done = children.run(in_order.command(home), folder / "said")
    if done.code != 0:
        raise RuntimeError(f"the undisturbed run failed with {done.code}: {done.err[-3000:]}")
    return Subject(EXPERIMENT, empty, (*in_order.words, "--jobs", "2"), done.seconds, 0, subjects.digests(home))


def marked(home: Path) -> Callable[[], None]:
    """A trap that harms nobody: the workers of a child carry the name of its home."""
    return lambda: os.environ.__setitem__(MARK, str(home))


def judge(subject: Subject, home: Path, outcome: children.Outcome) -> list[str]:
    """What is wrong with a home after a run that went to its end."""
    faults = kills.judge(subject, home, outcome)
    kept = [str(path.relative_to(home)) for path in home.glob("*/*/reserved.json")]
    faults += [f"numbers are still reserved: {', '.join(kept)}"] if kept else []
    return faults if children.gone(MARK, str(home), WITHIN) else [*faults, "workers are left"]


def kill_parent(subject: Subject, folder: Path, draw: Any, seconds: float) -> dict[str, Any]:
    """One trial: kill the parent, once or again, and then let the command go to its end."""
    home, said = subject.home(folder / "home"), folder / "said"
    trial: dict[str, Any] = {"kills": [], "faults": []}
    while True:
        after = draw.uniform(0, 1) * seconds
        outcome = children.kill_after(children.fork(subject.command(home), said, before=marked(home)), after)
        hit = outcome.killed_by == signal.SIGKILL
        trial["kills"].append({"after": after, "hit": hit})
        if not children.gone(MARK, str(home), WITHIN):
            trial["faults"].append(f"workers are left after the kill at {after:.2f} s")
        trial["faults"] += [f"torn after the kill at {after:.2f} s: {fault}" for fault in kills.torn(home)]
        if not hit or draw.random() >= kills.AGAIN:
            break
    if outcome.code != 0:
        outcome = children.run(subject.command(home), said, before=marked(home))
    trial["faults"] += judge(subject, home, outcome)
    if not trial["faults"]:
        shutil.rmtree(folder)
    return trial


def kills_of_parents(folder: Path, *, count: int, seed: int = 0, seeds: Sequence[int] = (0, 1)) -> dict[str, Any]:
    """SIGKILL to the parent at `count` random points, after one run that nothing disturbs."""
    subject = make_subject(folder, seeds)
    home = subject.home(folder / "undisturbed/home")
    whole = children.run(subject.command(home), folder / "undisturbed/said", before=marked(home))
    trials = [{"kills": [], "faults": judge(subject, home, whole)}]
    for number in range(count):
        draw = children.draws(seed, f"parent {number}")
        trials.append(kill_parent(subject, folder / f"parent-{number}", draw, whole.seconds))
    return {
        "trials": len(trials),
        "hits": sum(kill["hit"] for trial in trials for kill in trial["kills"]),
        "failed": [trial for trial in trials if trial["faults"]],
    }
