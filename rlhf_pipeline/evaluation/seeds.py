"""Intervals and p-values over several seeds and prompts.

The interval depends on the statement. "On these prompts": Student's t over seeds. "On prompts like these": the crossed
form, in which prompts count as sampled too; the coverage of a t over seeds alone is far too low there. One seed
supports no statement about other seeds, whatever its interval.

Legend: S seeds, P prompts; values (S, P) hold one figure per seed and prompt, (S,) one per seed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf_pipeline.evaluation.statistics import (
    FEW_CLUSTERS,
    Estimate,
    agreement,
    clustered,
    effective_size,
    replicate_interval,
    replicate_p,
    share_error,
    share_over_prompts,
    standard_error,
    student_p,
    student_quantile,
    variance_of_mean,
    wilson_interval,
)

OVER_SEEDS = "t over seeds"
OVER_BOTH = "t over seeds and prompts"
SHARE_OVER = {OVER_SEEDS: "wilson over seeds", OVER_BOTH: "wilson over seeds and prompts"}
"""The name of a share's method, by the name of a plain mean's method."""

MOST = 1_000_000
"""An effect that needs more seeds or prompts than this counts as no effect."""


@dataclass(frozen=True)
class Inference:
    """A mean over seeds and prompts, and the two-sided p-value of "it is `null`".

    p is None where one unit leaves no degrees of freedom. In `estimate`, clusters counts what the degrees of freedom
    count: seeds where method says "over seeds" or "over seeds and prompts", else prompts.
    """

    estimate: Estimate
    p: float | None


def _table(values: ArrayLike) -> np.ndarray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim not in (1, 2) or not table.size:
        raise ValueError(f"found values of shape {table.shape}, expected (seeds, prompts) or (seeds,), not empty")
    if not np.isfinite(table).all():
        raise ValueError(f"found {np.count_nonzero(~np.isfinite(table))} values that are not finite, expected none")
    return table


def _over_units(
    mean: float, variance: float, shape: tuple[int, int], method: str, *, units: int, agree: float | None, null: float
) -> Inference:
    """mean +- t(S - 1) sqrt(variance); of a share Wilson's interval with that quantile.

    units, agree: of a share, see `statistics.effective_size`; any other figure has no `agree`.
    """
    seeds, prompts = shape
    quantile, error = student_quantile(seeds - 1), math.sqrt(variance)
    if agree is not None:
        # Agreement of all prompts is no evidence over few seeds: it keeps the quantile of that many prompts.
        scale = (student_quantile(units - 1) / quantile) ** 2 if math.isfinite(quantile) else 1.0
        size = effective_size(mean, variance, units, agree, min(scale, 1.0))
        low, high = wilson_interval(mean, size, quantile)
        error, method = share_error(size, null), SHARE_OVER[method]
    else:
        low, high = mean - quantile * error, mean + quantile * error
    estimate = Estimate(mean, low, high, seeds * prompts, seeds, method)
    return Inference(estimate, student_p(mean - null, error, seeds - 1))


def over_seeds(values: ArrayLike, *, null: float = 0.0, share: bool = False) -> Inference:
    """Student's t over seeds, conditional on these prompts: m +- t(S - 1) s_seed / sqrt(S).

    m_s is the mean of seed s over its prompts, m the mean and s_seed the standard deviation of the m_s.

    Args:
        values: (S, P) or (S,). share: all of them are in [0, 1]; the interval is Wilson's.

    Raises:
        ValueError: the table is empty or not finite. One seed is not an error: its interval is infinite.
    """
    table = _table(values)
    per_seed = table if table.ndim == 1 else table.mean(1)
    shape = (len(per_seed), 1 if table.ndim == 1 else table.shape[1])
    agree = agreement(table if table.ndim == 1 else table.mean(0)) if share else None
    mean, variance = float(per_seed.mean()), variance_of_mean(per_seed)
    return _over_units(mean, variance, shape, OVER_SEEDS, units=max(shape), agree=agree, null=null)


def over_seeds_and_prompts(values: ArrayLike, *, null: float = 0.0, share: bool = False) -> Inference:
    """The crossed form: m +- t(S - 1) sqrt(s_seed^2 / S + s_prompt^2 / P).

    s_seed is the standard deviation of the S seed means, s_prompt that of the P prompt means. With effects of seed and
    prompt and a rest e, each of the two terms holds e's share sigma_e^2 / (S P), which should be counted once: the
    interval is conservative, and more so with its S - 1 degrees of freedom if prompts dominate. Measured for 3 and 5
    seeds, 16 and 64 prompts: 95 to 100 %. (Satterthwaite's degrees of freedom would be shorter and cover 92 % at 3
    seeds where both effects are of one size.)

    Args:
        values: (S, P), S and P at least 2.

    Raises:
        ValueError: the shape is wrong, or values are not finite.
    """
    table = _table(values)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"found values of shape {table.shape}, expected at least 2 seeds and 2 prompts")
    seeds, prompts = table.shape
    variance = variance_of_mean(table.mean(1)) + variance_of_mean(table.mean(0))
    agree = agreement(table.mean(0)) if share else None
    return _over_units(
        float(table.mean()), variance, (seeds, prompts), OVER_BOTH, units=prompts, agree=agree, null=null
    )


def over_prompts(values: ArrayLike, *, null: float = 0.0, share: bool = False) -> Inference:
    """One seed: the interval of `statistics.cluster_mean` over prompts (P,). It says nothing about other seeds.

    Raises:
        ValueError: the list is empty or not finite.
    """
    table = _table(values).ravel()
    return Inference(*clustered(table, range(len(table)), null=null, share=share))


def infer(values: ArrayLike, *, null: float = 0.0, share: bool = False) -> Inference:
    """The mean of (S, P) or (S,) with the interval that fits: over prompts for one seed, over seeds for one figure of
    each seed, else over seeds and prompts."""
    table = _table(values)
    if table.ndim == 2 and len(table) == 1:
        return over_prompts(table, null=null, share=share)
    if table.ndim == 1 or table.shape[1] == 1:
        return over_seeds(table, null=null, share=share)
    return over_seeds_and_prompts(table, null=null, share=share)


def contrast(a: ArrayLike, b: ArrayLike) -> Inference:
    """Mean of a - b, paired by seed and prompt; see `infer`.

    Args:
        a, b: (S, P) each, or (S,) each; the same seeds and prompts in the same order.

    Raises:
        ValueError: for different shapes.
    """
    one, other = _table(a), _table(b)
    if one.shape != other.shape:
        raise ValueError(f"found shapes {one.shape} and {other.shape}, expected the same seeds and prompts in both")
    return infer(one - other)


def from_replicates(
    values: np.ndarray, replicates: np.ndarray, prompts: int, *, null: float = 0.0, agree: float | None = None
) -> Inference:
    """`infer` for a statistic that is not a mean over prompts: one value per seed, and its bootstrap over prompts.

    One seed: the interval of the replicates. Several seeds: t over the seeds' values; the variance over replicates of
    the mean over seeds replaces s_prompt^2 / P.

    Args:
        values: (S,). replicates: (B, S), the statistic with prompts redrawn, the same draws for every seed.
        agree: of a share, see `statistics.effective_size`; None for any other statistic.
    """
    seeds = len(values)
    if seeds > 1:
        variance = variance_of_mean(values) + standard_error(replicates.mean(1), prompts) ** 2
        mean, shape = float(values.mean()), (seeds, prompts)
        return _over_units(mean, variance, shape, OVER_BOTH, units=prompts, agree=agree, null=null)
    value, column = float(values[0]), replicates[:, 0]
    if agree is not None:
        variance = standard_error(column, prompts) ** 2
        return Inference(*share_over_prompts(value, variance, prompts, agree, n=prompts, null=null))
    p = replicate_p(value, column, prompts, null=null)
    return Inference(replicate_interval(value, column, prompts, n=prompts), p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down p-values (Holm 1979): p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)).

    None (a contrast that could not be computed) stays None and does not count.
    """
    tests = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, place) in enumerate(tests):
        running = max(running, min(1.0, (len(tests) - rank) * p))
        adjusted[place] = running
    return adjusted


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
