"""The number of seeds or prompts that would settle an uncertain difference."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

from rlhf_pipeline.evaluation.seeds import OVER_BOTH, OVER_SEEDS
from rlhf_pipeline.evaluation.statistics import FEW_CLUSTERS, Estimate, student_quantile

MOST = 1_000_000
"""An effect that needs more units than this counts as no effect."""


def needed(difference: Estimate) -> dict[str, Any] | None:
    """The number of seeds or prompts at which the 95 % interval excludes 0, if effect and spread stay the same.

    The smallest N' >= 2 with q(N') (h / q(N)) sqrt(N / N') < |mean|: N the present number of what the interval counts,
    h its longer half, q the 97.5 % quantile: Student's with N' - 1 degrees of freedom; for prompts the normal one from
    50 on, as in intervals. An interval over seeds and prompts does not hold the parts of its variance: the answer is
    then for both growing in the same proportion.

    Returns:
        {"count", "unit"}; None if more than a million are needed, or if there is only one.
    """
    now, effect = difference.clusters, abs(difference.mean)
    over_seeds = difference.method in (OVER_SEEDS, OVER_BOTH)
    if now < 2:
        return None

    def quantile(count: int) -> float:
        return student_quantile(math.inf if count >= FEW_CLUSTERS and not over_seeds else count - 1)

    half = max(difference.high - difference.mean, difference.mean - difference.low)
    variance = (half / quantile(now)) ** 2

    def enough(count: int) -> bool:
        return quantile(count) * math.sqrt(variance * now / count) < effect

    count = 2 + bisect_left(range(2, MOST + 1), True, key=enough)
    if count > MOST:
        return None
    unit = (
        "seeds (and prompts in proportion)" if difference.method == OVER_BOTH else "seeds" if over_seeds else "prompts"
    )
    return {"count": count, "unit": unit}
