"""Intervals for means over prompts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

FEW_CLUSTERS = 50

Numbers = Sequence[float] | np.ndarray
"""One figure per response, pair or prompt, (N,)."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval. n: values; clusters: prompts; method: "t" or "bootstrap"."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int
    method: str

    def as_dict(self) -> dict[str, float | int | str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def cluster_mean(
    values: Numbers,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
    share: bool = False,
) -> Estimate:
    """Mean of `values` with an interval that treats values of one prompt as dependent.

    Fewer than 50 prompts: Student t over prompt means (each prompt counts the same; where all have equally many
    values this is the mean of all). Otherwise: percentile bootstrap over prompts of sum(values) / sum(counts).
    The interval of a `share` ends at 0 and 1.

    Raises:
        ValueError: without values, or with lists of different length.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(
            f"found {len(values)} values and {len(clusters)} clusters, expected equally many, at least one"
        )
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    sums = np.bincount(codes, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(codes)
    groups = len(numbers)
    if groups < FEW_CLUSTERS:
        means = sums / counts
        mean = float(means.mean())
        half = math.inf
        if groups > 1:
            from scipy.special import stdtrit  # Student's quantile; importing scipy.stats takes .3 s

            half = float(stdtrit(groups - 1, (1 + level) / 2) * means.std(ddof=1) / math.sqrt(groups))
        low, high = mean - half, mean + half
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
        return Estimate(mean, low, high, len(values), groups, "t")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, groups, (resamples, groups))
    replicates = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), len(values), groups, "bootstrap")
