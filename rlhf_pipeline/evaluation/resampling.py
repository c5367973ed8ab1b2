"""Intervals and p-values from replicates: prompts drawn with replacement, and Student's t.

A statistic that is no plain mean (a curve read at one KL, a strength, a refitted win rate) is computed anew in every
replicate. From 50 prompts on its interval is the percentile interval of the replicates (Efron and Tibshirani 1993,
chapter 13). Below, that covers too little, and the replicates give a standard error only:

    value +- t(P - 1) sqrt(P / (P - 1)) sd(replicates)

For a plain mean this is Student's t over prompt means, as in `statistics.cluster_mean`, up to the resampling noise.
Measured by simulation (tests/evaluation/test_coverage.py) the percentile interval of 100 prompts covers 93.5 to 94.5 %,
the t of 16 prompts 95 to 96 %.
Shapes: B replicates, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from rlhf_pipeline.evaluation.statistics import FEW_CLUSTERS, Estimate, Numbers, cluster_mean

RESAMPLES = 2000


def student_quantile(degrees: float, level: float = 0.95) -> float:
    """The t that |T| exceeds with probability 1 - level; infinite without degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2)) if degrees > 0 else math.inf


def student_p(difference: float, error: float, degrees: float) -> float | None:
    """Two-sided p-value of a difference with this standard error; None without degrees of freedom."""
    from scipy.special import stdtr

    if degrees <= 0 or not math.isfinite(error):
        return None
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stdtr(degrees, -abs(difference) / error))


def draw_counts(prompts: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each prompt is drawn in each replicate: (B, P), rows sum to P.

    The draws are those of `statistics.cluster_mean` with the same seed, so p-values belong to its intervals.
    """
    drawn = np.random.default_rng(seed).integers(0, prompts, (resamples, prompts))
    drawn += prompts * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * prompts).reshape(resamples, prompts).astype(np.float64)


def standard_error(replicates: np.ndarray, prompts: int) -> float:
    """sqrt(P / (P - 1)) sd(replicates): the factor undoes the bootstrap's division by P. (B,) -> number."""
    if prompts < 2:
        return math.inf
    return float(replicates.std() * math.sqrt(prompts / (prompts - 1)))


def replicate_interval(value: float, replicates: np.ndarray, prompts: int, *, n: int, level: float = 0.95) -> Estimate:
    """A statistic with the interval that its replicates (B,) give; see the head of this module."""
    if prompts < FEW_CLUSTERS:
        half = student_quantile(prompts - 1, level) * standard_error(replicates, prompts)
        return Estimate(value, value - half, value + half, n, prompts, "t")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), n, prompts, "bootstrap")


def replicate_p(value: float, replicates: np.ndarray, prompts: int, *, null: float = 0.0) -> float | None:
    """Two-sided p-value of "the statistic is `null`".

    From 50 prompts on p = 2 min(1 + #{replicates <= null}, 1 + #{replicates >= null}) / (B + 1), at most 1: the level
    at which the percentile interval just reaches `null`. Where no replicate reaches it, they say no more than that p is
    below 2 / (B + 1), which a correction for some fifty contrasts would always take away: then it is the tail of
    Student's t with P - 1 degrees of freedom, and at most that. Below 50 prompts: Student's t.
    """
    tail = student_p(value - null, standard_error(replicates, prompts), prompts - 1)
    if prompts < FEW_CLUSTERS:
        return tail
    beyond = min(np.count_nonzero(replicates <= null), np.count_nonzero(replicates >= null))
    p = min(1.0, 2 * (1 + beyond) / (1 + len(replicates)))
    return p if beyond or tail is None else min(p, tail)


def clustered(
    values: Numbers,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
    null: float = 0.0,
    share: bool = False,
) -> tuple[Estimate, float | None]:
    """`statistics.cluster_mean` and the two-sided p-value of "the mean is `null`".

    Args:
        values, clusters: equally many; values of one cluster are treated as dependent.

    Raises:
        ValueError: without values, or with lists of different length.
    """
    estimate = cluster_mean(values, clusters, level=level, seed=seed, resamples=resamples, share=share)
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    sums, counts = np.bincount(codes, weights=np.asarray(values, dtype=np.float64)), np.bincount(codes)
    groups = len(counts)
    if groups < FEW_CLUSTERS:
        error = float((sums / counts).std(ddof=1) / math.sqrt(groups)) if groups > 1 else math.inf
        return estimate, student_p(estimate.mean - null, error, groups - 1)
    weights = draw_counts(groups, resamples=resamples, seed=seed)
    return estimate, replicate_p(estimate.mean, (weights @ sums) / (weights @ counts), groups, null=null)
