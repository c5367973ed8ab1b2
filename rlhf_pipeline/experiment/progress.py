"""Progress of an experiment: finished runs, and an estimate of the remaining time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from statistics import fmean
from typing import Any

from rlhf_pipeline.config.grid import Node


@dataclass(frozen=True)
class Outcome:
    """The result of one node of an experiment."""

    node: Node
    model: str
    skipped: bool
    seconds: float | None

    def as_point(self) -> dict[str, Any]:
        """The entry of this node in the result of an experiment with several seeds or settings."""
        return {
            "stage_name": self.node.name,
            "seed": self.node.spec.config.seed if self.node.seed is None else self.node.seed,
            "setting": dict(self.node.setting),
            "model": self.model,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }


def time_left(waiting: Sequence[str], seconds: Mapping[str, Sequence[float]]) -> float | None:
    """Estimated seconds for the waiting runs: each takes the mean of its stage so far. None if a mean is not known.

    Args:
        waiting: the stage of each waiting run. seconds: the durations of finished runs, by stage.
    """
    if any(not seconds.get(name) for name in waiting):
        return None
    return sum(fmean(seconds[name]) for name in waiting)


def urgency(inputs: Sequence[Collection[int]]) -> list[int]:
    """For each run the length of the longest chain of runs that need it, one after another.

    Args:
        inputs: for each run, the indices of the earlier runs that it needs.
    """
    found = [0] * len(inputs)
    for place in reversed(range(len(inputs))):
        for one in inputs[place]:
            found[one] = max(found[one], found[place] + 1)
    return found


def makespan(seconds: Sequence[float], inputs: Sequence[Collection[int]], jobs: int) -> float:
    """The time of runs with up to `jobs` at a time: of those whose inputs exist, the most urgent starts first.

    Args:
        seconds: the duration of each run. inputs: for each run, the indices of the earlier runs that it needs.
    """
    urgent = urgency(inputs)
    waiting = sorted(range(len(seconds)), key=lambda place: -urgent[place])
    done: set[int] = set()
    running: list[tuple[float, int]] = []
    now = 0.0
    while waiting or running:
        for place in list(waiting):
            if len(running) < jobs and done.issuperset(inputs[place]):
                waiting.remove(place)
                heappush(running, (now + seconds[place], place))
        now, place = heappop(running)
        done.add(place)
    return now


def spoken(seconds: float) -> str:
    """A rounded duration: `40 s`, `12 min`, `2.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def progress_line(waiting: Sequence[str], ended: Sequence[tuple[str, bool, float | None]]) -> str:
    """Finished runs and the time left: `ran 6, skipped 0; about 12 min left`.

    Args:
        waiting: the stage of each waiting run. ended: the stage of each finished run, whether it was skipped, seconds.
    """
    seconds = durations(ended)
    skipped = sum(was_skipped for _, was_skipped, _ in ended)
    counts, left = f"ran {len(ended) - skipped}, skipped {skipped}", time_left(waiting, seconds)
    return counts if left is None else f"{counts}; about {spoken(left)} left"


def durations(ended: Sequence[tuple[str, bool, float | None]]) -> dict[str, list[float]]:
    """The known durations of finished runs, by stage; `ended` as for `progress_line`."""
    seconds: dict[str, list[float]] = {}
    for name, _, taken in ended:
        if taken is not None:
            seconds.setdefault(name, []).append(taken)
    return seconds


def progress_at_once(
    left: Mapping[int, float], nodes: Sequence[Node], ended: Sequence[tuple[str, bool, float | None]], jobs: int
) -> str:
    """As `progress_line`, for several runs at a time: `ran 6, skipped 0, running 2; about 12 min left`.

    Args:
        left: the indices of the nodes that are to end, those that run now first, each with the seconds that it has run
            already; 0 for those that wait. ended: as for `progress_line`.
    """
    known = durations(ended)
    skipped = sum(was_skipped for _, was_skipped, _ in ended)
    running = sum(elapsed > 0 for elapsed in left.values())
    counts = f"ran {len(ended) - skipped}, skipped {skipped}, running {running}"
    if not left or any(nodes[place].name not in known for place in left):
        return counts
    places = {place: number for number, place in enumerate(left)}
    seconds = [max(0.0, fmean(known[nodes[place].name]) - elapsed) for place, elapsed in left.items()]
    inputs = [{places[one] for one in nodes[place].inputs.values() if one in places} for place in left]
    return f"{counts}; about {spoken(makespan(seconds, inputs, jobs))} left"
