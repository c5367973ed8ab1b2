"""The frontier of an arm: its reward at a given KL (or cost), and the difference of two arms' frontiers.

An arm is trained at several settings; each gives a point (KL to the reference, reward). The Pareto-optimal settings are
chosen on validation prompts; their points on test prompts are joined by straight lines. Nothing is extrapolated beyond
an arm's own range. A chord is below a concave curve, so a coarse grid of settings underestimates an arm slightly: use
grids of similar density for the compared arms. Equal KL is not equal optimisation (Gao et al. 2022, section 3.3).

KL may be replaced by any x, for example FLOPs.
Legend: S seeds, G settings, P prompts, B replicates, M places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlhf_pipeline.evaluation.seeds import Inference, from_replicates
from rlhf_pipeline.evaluation.statistics import RESAMPLES, count_blocks

MOST_MISSED = 0.05
"""A statistic is undefined if more than this share of the replicates does not reach it."""

SLACK = 1e-9
"""Tolerance for rounding at the ends of an arm's range, as a share of the range."""


@dataclass(frozen=True)
class Curve:
    """One arm over its settings: x (KL or cost) and reward, (S, G, P) float64."""

    x: np.ndarray
    reward: np.ndarray

    @classmethod
    def of(cls, x: ArrayLike, reward: ArrayLike) -> Curve:
        """Make a curve from reward (S, G, P), or (G, P) for one seed, and x of the same shape, or without prompts.

        Raises:
            ValueError: wrong shapes, or figures that are not finite.
        """
        y, at = np.asarray(reward, dtype=np.float64), np.asarray(x, dtype=np.float64)
        if y.ndim not in (2, 3) or not y.size or at.shape not in (y.shape, y.shape[:-1]):
            raise ValueError(
                f"found x of shape {at.shape} and reward of shape {y.shape}, "
                "expected (seeds, settings, prompts) or (settings, prompts) in both; x may lack the prompts"
            )
        if not (np.isfinite(at).all() and np.isfinite(y).all()):
            raise ValueError("found figures that are not finite, expected none")
        at = np.broadcast_to(at if at.ndim == y.ndim else at[..., None], y.shape)
        return cls(at[None], y[None]) if y.ndim == 2 else cls(at, y)

    def means(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Means over prompts, (S, G) each; with weights (B, P) that sum to P in each row, (B, S, G)."""
        if weights is None:
            return self.x.mean(2), self.reward.mean(2)
        seeds, settings, prompts = self.x.shape
        both = [weights @ figure.reshape(-1, prompts).T / prompts for figure in (self.x, self.reward)]
        x, reward = (mean.reshape(-1, seeds, settings) for mean in both)
        return x, reward


def pareto(x: Sequence[float] | np.ndarray, reward: Sequence[float] | np.ndarray) -> list[int]:
    """Indices of the points that no other one beats (less or equal x, more or equal reward, one of them strictly), in
    the order of x; of equal points the first. x, reward: (G,)."""
    order = sorted(range(len(x)), key=lambda i: (x[i], -reward[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or reward[i] > reward[kept[-1]]:
            kept.append(i)
    return kept


def choose(validation: Curve) -> list[int]:
    """The Pareto-optimal settings by means over seeds and validation prompts, in the order of x."""
    x, reward = validation.means()
    return pareto(x.mean(0), reward.mean(0))


def interpolate(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation of y at the given places, with the points in the order of x; NaN outside [min x, max x].

    x, y: (..., G). at: (M,) or (..., M) -> (..., M). If several points have the same x, the last one counts.
    """
    order = np.argsort(x, axis=-1, kind="stable")
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    at = np.broadcast_to(at, (*x.shape[:-1], np.shape(at)[-1]))
    slack = SLACK * (x[..., -1:] - x[..., :1])
    inside = (at >= x[..., :1] - slack) & (at <= x[..., -1:] + slack)
    if x.shape[-1] == 1:
        return np.where(inside, y, np.nan)
    right = (x[..., None, :] <= at[..., :, None]).sum(-1).clip(1, x.shape[-1] - 1)
    x0, x1, y0, y1 = (np.take_along_axis(a, i, -1) for a in (x, y) for i in (right - 1, right))
    width = x1 - x0
    share = np.where(width > 0, (at - x0) / np.where(width > 0, width, 1.0), 1.0).clip(0.0, 1.0)
    return np.where(inside, y0 + share * (y1 - y0), np.nan)


def common_range(*curves: Curve) -> tuple[float, float] | None:
    """The range of x that every seed of every arm reaches, by means over prompts; None if there is none."""
    means = [curve.means()[0] for curve in curves]
    low, high = max(x.min(1).max() for x in means), min(x.max(1).min() for x in means)
    return (float(low), float(high)) if low < high else None


@dataclass(frozen=True)
class Reading:
    """A statistic of one or two curves, or the reason why there is none.

    at: its x; missed: the share of replicates that do not reach it (they are left out of the interval).
    """

    inference: Inference | None
    at: float | None
    missed: float
    why_not: str | None = None


Points = tuple[np.ndarray, np.ndarray]


def _read(
    statistic: Callable[[Sequence[Points]], np.ndarray],
    curves: Sequence[Curve],
    *,
    at: float | None,
    reached: str,
    resamples: int,
) -> Reading:
    """A statistic of the curves' points, ((..., S, G), (..., S, G)) each -> (..., S), NaN where undefined: for each
    seed, and in every replicate over prompts."""
    shapes = {(curve.x.shape[0], curve.x.shape[2]) for curve in curves}
    if len(shapes) > 1:
        raise ValueError(f"found curves of (seeds, prompts) {sorted(shapes)}, expected the same in all")
    _, prompts = shapes.pop()
    values = statistic([curve.means() for curve in curves])
    if np.isnan(values).any():
        missed = float(np.isnan(values).mean())
        return Reading(None, at, missed, f"not reached: {reached}")
    blocks = count_blocks(prompts, resamples=resamples)
    replicates = np.concatenate([statistic([curve.means(counts) for curve in curves]) for counts in blocks])
    lost = np.isnan(replicates).any(1)
    missed = float(lost.mean())
    if missed > MOST_MISSED:
        return Reading(None, at, missed, f"not reached in {missed:.0%} of the resampled sets of prompts: {reached}")
    return Reading(from_replicates(values, replicates[~lost], prompts), at, missed)


def _ranges(curves: Sequence[Curve], names: Sequence[str]) -> str:
    parts = []
    for curve, name in zip(curves, names):
        x = curve.means()[0]
        parts.append(f"{name} covers {x.min(1).max():.3g} to {x.max(1).min():.3g}")
    return ", ".join(parts)


def reward_at(
    curve: Curve,
    at: float,
    *,
    name: str = "the arm",
    resamples: int = RESAMPLES,
) -> Reading:
    """The reward of one arm at x = at, each seed by its own curve, with the interval of `seeds.from_replicates`.

    Undefined if the curve of a seed, or more than 5 % of the replicates, does not reach it.
    """
    place = np.array([at])
    return _read(
        lambda points: interpolate(*points[0], place)[..., 0],
        [curve],
        at=at,
        reached=f"{_ranges([curve], [name])}, requested is {at:.3g}",
        resamples=resamples,
    )


def difference_at(
    a: Curve,
    b: Curve,
    at: float | None = None,
    *,
    names: tuple[str, str] = ("the first", "the second"),
    resamples: int = RESAMPLES,
) -> Reading:
    """The reward of a minus that of b at the same x, by default the middle of their common range.

    One seed: the interval is that of the replicates over prompts, each with its own interpolation. Several seeds: t
    over the differences of the seeds, with the variance of the replicates added.

    Args:
        a, b: curves with the same seeds and prompts, each with its own settings, chosen on other prompts (`choose`).

    Raises:
        ValueError: where seeds or prompts do not match.
    """
    reached = _ranges([a, b], names)
    if at is None:
        common = common_range(a, b)
        if common is None:
            return Reading(None, None, 1.0, f"no common range: {reached}")
        at = sum(common) / 2
    place = np.array([at])
    return _read(
        lambda points: interpolate(*points[0], place)[..., 0] - interpolate(*points[1], place)[..., 0],
        [a, b],
        at=at,
        reached=f"{reached}, requested is {at:.3g}",
        resamples=resamples,
    )


def _mean_gap(points: Sequence[Points]) -> np.ndarray:
    """Integral of a - b over the common range of x, divided by its width; exact for curves of straight lines."""
    (xa, ya), (xb, yb) = points
    low = np.maximum(xa.min(-1), xb.min(-1))[..., None]
    high = np.minimum(xa.max(-1), xb.max(-1))[..., None]
    empty = low >= high
    top = np.where(empty, low, high)
    knots = np.sort(np.concatenate([xa, xb], -1).clip(low, top), -1)
    gap = interpolate(xa, ya, knots) - interpolate(xb, yb, knots)
    area = (np.diff(knots, axis=-1) * (gap[..., 1:] + gap[..., :-1]) / 2).sum(-1)
    return np.where(empty[..., 0], np.nan, area / np.where(empty, 1.0, top - low)[..., 0])


def area_between(
    a: Curve,
    b: Curve,
    *,
    names: tuple[str, str] = ("the first", "the second"),
    resamples: int = RESAMPLES,
) -> Reading:
    """The area between two arms' curves over their common range of x, divided by its width: the mean difference in
    reward over that range. Each seed and each replicate has its own range.

    Raises:
        ValueError: where seeds or prompts do not match.
    """
    return _read(
        _mean_gap,
        [a, b],
        at=None,
        reached=f"no common range: {_ranges([a, b], names)}",
        resamples=resamples,
    )
