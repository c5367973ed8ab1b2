"""Progress of an experiment: finished runs, and an estimate of the remaining time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean


def time_left(waiting: Sequence[str], seconds: Mapping[str, Sequence[float]]) -> float | None:
    """Estimated seconds for the waiting runs: each takes the mean of its stage so far. None if a mean is not known.

    Args:
        waiting: the stage of each waiting run. seconds: the durations of finished runs, by stage.
    """
    if any(not seconds.get(name) for name in waiting):
        return None
    return sum(fmean(seconds[name]) for name in waiting)


def spoken(seconds: float) -> str:
    """A rounded duration: `40 s`, `12 min`, `2.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Progress:
    """Counts the runs of an experiment.

    Args:
        names: the stage of each run, in running order. done: whether each run is known to be done.
    """

    def __init__(self, names: Sequence[str], done: Sequence[bool]):
        self._names, self._done = list(names), list(done)
        self._seconds: dict[str, list[float]] = {}
        self.ran = self.skipped = 0

    def ended(self, place: int, skipped: bool, seconds: float | None) -> None:
        """Record a finished run with its duration."""
        self._done[place] = True
        self.skipped += skipped
        self.ran += not skipped
        if seconds is not None:
            self._seconds.setdefault(self._names[place], []).append(seconds)

    def told(self, place: int) -> str:
        """Finished runs and the time left, including the run at `place`: `ran 6, skipped 0; about 12 min left`."""
        waiting = [name for name, done in zip(self._names[place:], self._done[place:], strict=True) if not done]
        left = time_left(waiting, self._seconds)
        counts = f"ran {self.ran}, skipped {self.skipped}"
        return counts if left is None else f"{counts}; about {spoken(left)} left"
