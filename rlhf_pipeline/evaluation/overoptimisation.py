"""Over-optimisation: the optimised reward (proxy) keeps rising while the gold reward falls.

Gao et al. 2022 ("Scaling laws for reward model overoptimization"), eq. 1, with d = sqrt(KL(pi || pi_ref)):

    best-of-n  R(d) - R(0) = d (alpha - beta d)            peak at d = alpha / (2 beta)
    RL         R(d) - R(0) = d (alpha - beta ln d)         peak at d = exp(alpha / beta - 1)

R is the judge's score or the true reward, never the optimised one; R(0) is the reward of the reference, from which d is
measured. The RL form has an infinite slope at 0 and does not describe small d. Neither form predicts anything outside
the distances that it was fitted to, and both can peak where a reward only levels off: a peak alone is no finding
(`overoptimised`). Legend: S seeds, G points (settings or snapshots), P prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf_pipeline.evaluation.seeds import holm, infer
from rlhf_pipeline.evaluation.statistics import LEVEL

Form = Literal["bon", "rl"]

NEAR = 0.5
"""The RL form is fitted to points with d of at least this (KL 0.25)."""

FEWEST = 3
"""The least number of different distances for a fit of two parameters."""


@dataclass(frozen=True)
class Fit:
    """One of the two forms. peak: the d of its maximum, None where it has none inside the data (between `least` and
    `largest`, the distances that it was fitted to); points: how many these are; residual: root of their mean squared
    residual."""

    form: Form
    alpha: float
    beta: float
    peak: float | None
    least: float
    largest: float
    points: int
    residual: float


def fit_gain(form: Form, distance: ArrayLike, gain: ArrayLike) -> Fit | None:
    """Least squares of one form, linear in alpha and beta.

    Args:
        distance: (G,) d = sqrt(KL). gain: (G,) R - R(reference), of the judge or the truth.

    Returns:
        None if there are fewer than three different distances.

    Raises:
        ValueError: the lengths differ, a distance is negative, or a figure is not finite.
    """
    d, y = np.asarray(distance, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    if d.shape != y.shape or d.ndim != 1 or (d < 0).any() or not (np.isfinite(d).all() and np.isfinite(y).all()):
        raise ValueError(
            f"found distances {d.shape} and gains {y.shape}, expected equally many, finite, distances >= 0"
        )
    used = d >= NEAR if form == "rl" else d > 0
    d, y = d[used], y[used]
    if len(np.unique(d)) < FEWEST:
        return None
    features = np.stack([d, -(d**2 if form == "bon" else d * np.log(d))], -1)
    (alpha, beta), *_ = np.linalg.lstsq(features, y, rcond=None)
    residual = float(np.sqrt(np.mean((features @ np.array([alpha, beta]) - y) ** 2)))
    peak = None
    if beta > 0 and form == "bon" and alpha > 0:
        peak = float(alpha / (2 * beta))
    elif beta > 0 and form == "rl" and alpha / beta < math.log(1e6):  # beyond: outside any data
        peak = float(math.exp(alpha / beta - 1))
    least, largest = float(d.min()), float(d.max())
    if peak is not None and not least < peak < largest:
        peak = None
    return Fit(form, float(alpha), float(beta), peak, least, largest, len(d), residual)


@dataclass(frozen=True)
class Overoptimisation:
    """Whether it was found, in words why or why not. p: of the fall of the gold reward to that of the farthest point,
    from the highest of all points that qualify (of the clearest fall where none is certain), corrected for the points
    looked at."""

    found: bool
    why: str
    p: float | None = None


def overoptimised(
    distance: ArrayLike,
    proxy: ArrayLike,
    gold: ArrayLike,
    fitted: Fit | None,
) -> Overoptimisation:
    """Whether the gold reward falls while the optimised one still rises, within the range of the data.

    Found if both hold:

    1. the fit has a peak, which lies inside the data then;
    2. from some nearer point to the farthest one, paired by seed and prompt, the gold reward falls and the optimised
       one rises, each significantly. Per point p is the larger of the two p-values; over the points, Holm's correction
       (all of them are looked at, so the choice of the highest one costs nothing). Where the gold reward only
       levels off, this is wrong in at most 5 % of cases.

    Args:
        distance: (G,) d = sqrt(KL). proxy, gold: (S, G, P) or (G, P), the rewards.
    """
    d = np.asarray(distance, dtype=np.float64)
    both = [np.asarray(x, dtype=np.float64) for x in (proxy, gold)]
    optimised, measured = (x[None] if x.ndim == 2 else x for x in both)
    if optimised.shape != measured.shape or measured.ndim != 3 or measured.shape[1:2] != d.shape:
        raise ValueError(
            f"found {d.shape} distances, rewards {optimised.shape} and {measured.shape}; "
            "expected (points,) and twice (seeds, points, prompts)"
        )
    if fitted is None:
        return Overoptimisation(False, "too few points for a curve")
    if fitted.peak is None:
        reach = f"d = {fitted.least:.2f} to {fitted.largest:.2f}"
        return Overoptimisation(False, f"the fitted curve has no peak inside the data, {reach}")
    last = int(np.argmax(d))
    nearer = [i for i in range(len(d)) if d[i] < d[last]]
    p_values: list[float | None] = []
    for i in nearer:
        fall = infer(measured[:, last] - measured[:, i])
        rise = infer(optimised[:, last] - optimised[:, i])
        if fall.p is None or rise.p is None:
            p_values.append(None)
        else:
            p_values.append(max(fall.p, rise.p) if fall.estimate.mean < 0 < rise.estimate.mean else 1.0)
    known = [(p, i) for p, i in zip(holm(p_values), nearer) if p is not None]
    if not known:
        return Overoptimisation(False, "one prompt and one seed: no interval")
    certain = [(p, i) for p, i in known if p < 1 - LEVEL]
    if not certain:
        least = min(known)[0]
        return Overoptimisation(
            False, "no fall of the gold reward beside a rise of the optimised one is certain", least
        )
    p, since = max(certain, key=lambda one: measured[:, one[1]].mean())
    return Overoptimisation(True, f"the gold reward falls from d = {d[since]:.2f} to {d[last]:.2f}", p)
