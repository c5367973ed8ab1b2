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


def progress_line(waiting: Sequence[str], ended: Sequence[tuple[str, bool, float | None]]) -> str:
    """Finished runs and the time left: `ran 6, skipped 0; about 12 min left`.

    Args:
        waiting: the stage of each waiting run. ended: the stage of each finished run, whether it was skipped, seconds.
    """
    seconds: dict[str, list[float]] = {}
    for name, _, taken in ended:
        if taken is not None:
            seconds.setdefault(name, []).append(taken)
    skipped = sum(was_skipped for _, was_skipped, _ in ended)
    counts, left = f"ran {len(ended) - skipped}, skipped {skipped}", time_left(waiting, seconds)
    return counts if left is None else f"{counts}; about {spoken(left)} left"
