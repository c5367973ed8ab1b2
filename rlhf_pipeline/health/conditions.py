"""What conditions have in common: means, their errors, and what "late" means."""

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
    """Updates of a sixth of the run: when it is late they lie in the second half of its first third."""
    return max(1, min(RECENT, f.total // 6))
