"""The number of seeds or prompts that would settle an uncertain difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from rlhf_pipeline.evaluation.seeds import OVER_BOTH, OVER_SEEDS, SHARE_OVER, Inference
from rlhf_pipeline.evaluation.statistics import FEW_CLUSTERS, WILSON, Estimate, student_quantile

MOST = 1_000_000
"""An effect that needs more units than this counts as no effect."""


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest count from 2 on for which `enough`, a monotone condition, holds; None beyond MOST."""
    low, high = 1, 2
    while not enough(high):
        if high >= MOST:
            return None
        low, high = high, min(2 * high, MOST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _prompt_quantile(prompts: float, method: str) -> float:
    """The quantile of an interval over prompts: the normal one for a bootstrap, else Student's."""
    return student_quantile(math.inf if method != WILSON and prompts >= FEW_CLUSTERS else prompts - 1)


def _as_inference(estimate: Estimate, null: float) -> Inference:
    """Turn an interval into an `Inference` whose whole squared standard error belongs to the unit that it counts."""
    units, shares = estimate.clusters, (WILSON, *SHARE_OVER.values())
    seeds = estimate.method in (*SHARE_OVER, *SHARE_OVER.values())
    quantile = student_quantile(units - 1) if seeds else _prompt_quantile(units, estimate.method)
    variance = math.inf
    if units > 1 and estimate.method in shares and 0 < null < 1:
        # The longer half, from the mean to q: (mean - q)^2 = t^2 q (1 - q) / n.
        end = max(estimate.low, estimate.high, key=lambda end: abs(end - estimate.mean))
        variance = null * (1 - null) * ((estimate.mean - end) / quantile) ** 2 / (end * (1 - end))
    elif units > 1:
        variance = (max(estimate.high - estimate.mean, estimate.mean - estimate.low) / quantile) ** 2
    if seeds:
        return Inference(estimate, None, units, 1, variance, 0.0, null)
    return Inference(estimate, None, 1, units, 0.0, variance, null)


def needed(
    found: Inference | Estimate,
    unit: Literal["seeds", "prompts"] | None = None,
    *,
    null: float = 0.0,
) -> dict[str, Any] | None:
    """The number of seeds or prompts at which the 95 % interval excludes `null`, if effect and spread stay the same.

    The smallest N' >= 2 with q(N') sqrt(v N / N' + w) < |mean - null|: N the present number, v the part of the squared
    standard error that more of this unit reduces, w the other part; q the 97.5 % quantile: Student's with N' - 1
    degrees of freedom (S - 1 for prompts beside seeds); for prompts alone the normal one from 50 on, as in intervals,
    but for a share.

    Args:
        found: an `Inference` (with its own null), or an `Estimate`. An estimate over seeds and prompts does not hold
            its parts: the answer is then for both growing in the same proportion.
        unit: what there could be more of; by default what the interval counts.

    Returns:
        {"count", "unit"}; None if more than a million are needed, if the other part of the variance alone is too
        large, if the interval does not cover this unit, or if there is only one unit.
    """
    parted = isinstance(found, Inference)
    if not isinstance(found, Inference):
        found = _as_inference(found, null)
    unit = unit or ("seeds" if found.over_seeds else "prompts")
    seeds, shrinking, rest = found.seeds, found.seed_variance, found.prompt_variance
    if unit == "prompts":
        shrinking, rest = rest, shrinking
    now = found.seeds if unit == "seeds" else found.prompts
    effect = abs(found.estimate.mean - found.null)
    method = found.estimate.method
    if now < 2 or effect == 0 or (unit == "prompts" and method in (OVER_SEEDS, SHARE_OVER[OVER_SEEDS])):
        return None

    def enough(count: int) -> bool:
        if unit == "seeds":
            quantile = student_quantile(count - 1)
        else:
            quantile = student_quantile(seeds - 1) if seeds > 1 else _prompt_quantile(count, method)
        return quantile * math.sqrt(shrinking * now / count + rest) < effect

    count = _smallest(enough)
    if count is None:
        return None
    both = not parted and method in (OVER_BOTH, SHARE_OVER[OVER_BOTH])
    return {"count": count, "unit": "seeds (and prompts in proportion)" if both else unit}
