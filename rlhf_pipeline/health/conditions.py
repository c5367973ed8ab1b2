"""Functions that the conditions share: means, standard errors, and what "late" means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rlhf_pipeline.health.monitor import RECENT, Facts, History

Condition = Callable[[History, Facts], float | None]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more independent values."""
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def late(h: History, f: Facts) -> bool:
    """Whether the first third of the run is over."""
    return 3 * h.step >= f.total


def width(f: Facts) -> int:
    """The number of updates in a sixth of the run, at most RECENT.

    When `late` first holds, these updates are the second half of the first third of the run.
    """
    return max(1, min(RECENT, f.total // 6))
