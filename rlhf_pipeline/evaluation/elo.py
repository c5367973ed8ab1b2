"""Elo of several models: Bradley-Terry strengths from their wins over one another."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf_pipeline.evaluation.statistics import WILSON, Estimate, effective_size, wilson_interval
from rlhf_pipeline.evaluation.two_way import OVER_BOTH, SHARE_OVER_BOTH, Judged

ELO = 400 / math.log(10)
"""Elo points per unit of log-odds: 400 points are odds of ten to one."""

ANCHOR = 1000.0

NEWTON_STEPS = 100

Bound = Literal["at least", "at most"]


@dataclass(frozen=True)
class Standing:
    """Elo of one model; if its maximum-likelihood value is infinite, the known end of its interval (`bound`).

    With a bound, `elo.mean` is that end, and the other end of the interval is infinite.
    """

    elo: Estimate
    bound: Bound | None


def reachable(wins: np.ndarray) -> np.ndarray:
    """Whether a path of wins leads from i to j: (k, k) of bool, true on the diagonal."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for middle in range(len(wins)):  # Warshall 1962
        reach |= reach[:, middle, None] & reach[None, middle, :]
    return reach


def bradley_terry(wins: ArrayLike) -> np.ndarray:
    """Strengths s, mean 0, that maximise sum over i, j of w_ij log sigma(s_i - s_j).

    Concave; Newton's method with bounded steps. (Bradley and Terry 1952)

    Args:
        wins: (k, k): w_ij, how often i beat j; fractions allowed, ties as half a win for each.

    Returns:
        (k,), in log-odds.

    Raises:
        ValueError: wrong shapes, negative wins, or no path of wins from every model to every other one. The maximum
            is finite and unique if and only if there are such paths (Ford 1957).
    """
    table = np.asarray(wins, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table) or (table < 0).any():
        raise ValueError(f"found wins of shape {table.shape}, expected (k, k) and nothing negative")
    size = len(table)
    table = np.where(np.eye(size, dtype=bool), 0.0, table)
    if not reachable(table).all():
        raise ValueError("found models that never lost to the others, expected a path of wins from each to each")
    played, won, s = table + table.T, table.sum(1), np.zeros(size)
    for _ in range(NEWTON_STEPS):
        gradient = won - (played * _won_share(s)).sum(1)
        if (np.abs(gradient) < 1e-11 * max(played.sum(), 1.0)).all():
            break
        # The all-ones direction changes nothing; curvature along it makes the system solvable.
        hessian = _information(played, s)
        s += np.clip(np.linalg.solve(hessian + hessian.trace() / size**2, gradient), -1.0, 1.0)
        s -= s.mean()
    return s


def _won_share(s: np.ndarray) -> np.ndarray:
    """sigma(s_i - s_j): (k,) -> (k, k)."""
    return np.exp(-np.logaddexp(0.0, s[None, :] - s[:, None]))


def _information(played: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Minus the second derivative of the log-likelihood, (k, k); rows sum to 0."""
    p = _won_share(s)
    curvature = played * p * (1 - p)
    return np.diag(curvature.sum(1)) - curvature


def rank(
    wins: ArrayLike,
    *,
    baseline: int = 0,
    prompts: Sequence[Hashable] | None = None,
    labelers: Sequence[Hashable] | None = None,
) -> list[Standing]:
    """Elo of k models, 400 / ln 10 points per unit of log-odds, the baseline at 1000.

    The interval is Student's t over prompts of the distance to the baseline, with the variance of an M-estimator
    clustered by prompt (P prompts, g_p the score of prompt p, H the information of all; White 1982):

        var(s) = P / (P - 1) H^+ (sum_p g_p g_p') H^+

    With several labelers it is clustered by prompt and labeler: the influences H^+ g_n of judgements n take the place
    of psi_n in `two_way`.

    A model without a path of wins from the baseline to it (or from it to the baseline) has no finite Elo. Its standing
    is a bound: every unbroken row of wins over P prompts counts as the lower end of Wilson's interval for P of P. For
    two models this is the end of the win rate's interval on the Elo scale. Models in the baseline's group keep their
    finite values.

    Args:
        wins: (P, k, k): the share of comparisons on a prompt that i won against j (`win_rates.prompt_win_rates`),
            0 where they were not compared. With `prompts`: (N, k, k), one row for each judgement.
        prompts, labelers: (N,) of each row.

    Raises:
        ValueError: wrong shapes, or models that no path of wins joins with the baseline.
    """
    table = np.asarray(wins, dtype=np.float64)
    if table.ndim != 3 or table.shape[1] != table.shape[2] or table.shape[1] < 2:
        raise ValueError(f"found wins of shape {table.shape}, expected (prompts, k, k) with k >= 2")
    rows, size = table.shape[:2]
    judged = Judged.by(range(rows) if prompts is None else prompts, labelers)
    table = np.where(np.eye(size, dtype=bool), 0.0, table)
    totals = table.sum(0)
    reach = reachable(totals)
    above, below = reach[:, baseline], reach[baseline]
    if not (above | below).all():
        raise ValueError("found models that no path of wins joins with the baseline, expected each to be compared")
    method, bounded = ("t", WILSON) if judged.labelers == 1 else (OVER_BOTH, SHARE_OVER_BOTH)
    found: dict[int, Standing] = {}
    group = np.flatnonzero(above & below)
    inside = table[:, group][:, :, group]
    strengths = bradley_terry(inside.sum(0))
    place = group.tolist().index(baseline)
    errors = _errors(inside, strengths, place, judged)
    for i, value, error in zip(group.tolist(), strengths - strengths[place], errors, strict=True):
        mean, half = ANCHOR + ELO * float(value), judged.quantile * ELO * float(error) if i != baseline else 0.0
        found[i] = Standing(Estimate(mean, mean - half, mean + half, rows, judged.clusters, method), None)
    if len(found) < size:
        certain, _ = wilson_interval(1.0, effective_size(1.0, 0.0, judged.prompts, scale=judged.scale), judged.quantile)
        ends = _bounds(totals, baseline, certain, above, set(found))
        for i, (end, low, high) in ends.items():
            estimate = Estimate(end, low, high, rows, judged.clusters, bounded)
            found[i] = Standing(estimate, "at least" if above[i] else "at most")
    return [found[i] for i in range(size)]


def _errors(table: np.ndarray, s: np.ndarray, baseline: int, judged: Judged) -> np.ndarray:
    """Standard errors of s - s[baseline]: (N, k, k), (k,) -> (k,)."""
    played = table + np.swapaxes(table, 1, 2)
    scores = table.sum(2) - (played * _won_share(s)).sum(2)
    influence = scores @ np.linalg.pinv(_information(played.sum(0), s))
    return np.sqrt(judged.variance(influence - influence[:, [baseline]]))


def _bounds(
    totals: np.ndarray, baseline: int, certain: float, above: np.ndarray, known: set[int]
) -> dict[int, tuple[float, float, float]]:
    """The known end, the low and the high end of the models outside the baseline's group.

    certain: the win rate that an unbroken row of wins counts as; 0 if there is only one prompt.
    """
    played = totals + totals.T
    unbroken = (totals > 0) & ~reachable(totals).T
    poorest = np.where(unbroken, certain * played, np.where(unbroken.T, (1 - certain) * played, totals))
    strengths = bradley_terry(poorest) if certain > 0 else np.where(above, -math.inf, math.inf)
    found: dict[int, tuple[float, float, float]] = {}
    for i in set(range(len(totals))) - known:
        end = ANCHOR + ELO * float(strengths[i] - (strengths[baseline] if certain > 0 else 0.0))
        found[i] = (end, end, math.inf) if above[i] else (end, -math.inf, end)
    return found
