"""Win rates, plain and at equal length, of independent responses.

`compare` gives every model the same random numbers, which shortens intervals of differences of means. A win rate is not
a difference of means: response i of two models is a dependent pair, so pairs with equal index are left out
(`pairs_of`).

Legend: S seeds, P prompts, A and B responses per prompt of the two sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlhf_pipeline.evaluation.seeds import Inference, from_replicates, infer
from rlhf_pipeline.evaluation.statistics import RESAMPLES, agreement, count_blocks

RIDGE = 0.01
"""Ridge on phi of the length-controlled model, in which each prompt has weight 1: it keeps phi finite where length
decides every comparison, and moves an estimate from 100 prompts by about a thousandth of its value."""

NEWTON_STEPS = 60


ONE_SAMPLE = (
    "with one response per prompt and the same random numbers on both sides there are no independent responses: "
    "sample at least 2"
)


def pairs_of(one: int, other: int, coupled: bool) -> np.ndarray:
    """Which pairs of a prompt's responses are compared: (A, B) of bool.

    `coupled`: response i of both sides was drawn with the same random numbers (`SamplingPlan`), so the pair is
    dependent and is left out: over i != j the share won is unbiased for P(a > b) + P(a = b) / 2 of independent
    responses (a two-sample U-statistic without its diagonal; with it the bias is (P(a_i > b_i) - P(a > b)) / A).

    Raises:
        ValueError: coupled sides have different sizes, or one response each.
    """
    if not coupled:
        return np.ones((one, other), dtype=bool)
    if one != other:
        raise ValueError(f"found {one} and {other} responses a prompt, expected as many on coupled sides")
    if one < 2:
        raise ValueError(ONE_SAMPLE)
    return ~np.eye(one, dtype=bool)


def _outcomes(a: ArrayLike, b: ArrayLike, coupled: bool) -> np.ndarray:
    """1 where the first side's response scores higher, one half for a tie, else 0: (..., P, pairs)."""
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.ndim < 2 or one.shape[:-1] != other.shape[:-1]:
        raise ValueError(f"found figures of shape {one.shape} and {other.shape}, expected the same seeds and prompts")
    left, right = one[..., :, None], other[..., None, :]
    won = (left > right) + 0.5 * (left == right)
    return won[..., pairs_of(one.shape[-1], other.shape[-1], coupled)]


def prompt_win_rates(a: ArrayLike, b: ArrayLike, *, coupled: bool) -> np.ndarray:
    """P(a response of a beats one of b to the same prompt), ties one half, over the pairs of `pairs_of`:
    (..., P, A), (..., P, B) -> (..., P).

    The other side may be a policy or the demonstrations; leave out prompts without demonstrations.

    Args:
        coupled: both sides were sampled with the same random numbers.

    Raises:
        ValueError: where seeds or prompts do not match; see `pairs_of`.
    """
    return _outcomes(a, b, coupled).mean(-1)


def tie_share(a: ArrayLike, b: ArrayLike, *, coupled: bool) -> float:
    """The share of the same pairs that are ties, each prompt with weight 1."""
    return float((_outcomes(a, b, coupled) == 0.5).mean())


def win_rate(a: ArrayLike, b: ArrayLike, *, coupled: bool) -> Inference:
    """The mean of `prompt_win_rates` with its interval and the p-value of "it is one half"; see `seeds.infer`.

    Args:
        a: (P, A) or (S, P, A) figures of one side's responses. b: (P, B) or (S, P, B), the same seeds and prompts.
    """
    rates = np.atleast_2d(prompt_win_rates(a, b, coupled=coupled))
    return infer(rates, null=0.5, share=True)


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal length, or the reason why there is none. phi: log-odds per unit of length, mean over seeds.

    It is an association: it removes everything that goes with length in these responses, causal or not.
    """

    inference: Inference | None
    phi: float | None
    why_not: str | None


def _cells(won: np.ndarray, gap: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight and won weight of each (prompt, length difference), from (P, pairs): (P, U) each; a prompt weighs 1.

    The likelihood depends only on the length difference and outcome of each comparison, so these cells are sufficient.
    """
    prompts = len(won)
    place = np.searchsorted(unit, gap) + len(unit) * np.arange(prompts)[:, None]
    size, share = prompts * len(unit), 1.0 / won.shape[1]
    weight = np.bincount(place.ravel(), minlength=size) * share
    total = np.bincount(place.ravel(), weights=won.ravel(), minlength=size) * share
    return weight.reshape(prompts, -1), total.reshape(prompts, -1)


def _fit(weight: np.ndarray, won: np.ndarray, feature: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Maximise sum_u [won_u theta' - weight_u log(1 + exp theta')] - ridge / 2 phi^2, theta' = theta + phi feature_u.

    Newton's method on each row: weight, won (N, U); feature (U,) -> theta, phi (N,). A row that won (or lost) every
    comparison has theta = +-inf and phi 0.
    """
    total, wins = weight.sum(1), won.sum(1)
    theta, phi = np.zeros(len(weight)), np.zeros(len(weight))
    slack = 1e-9 * total
    theta[wins >= total - slack], theta[wins <= slack] = np.inf, -np.inf
    open_rows = np.isfinite(theta).nonzero()[0]
    n, y = weight[open_rows], won[open_rows]
    at = np.zeros((len(open_rows), 2))
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(at[:, :1] + at[:, 1:] * feature)))
        rest, curvature = y - n * p, n * p * (1 - p)
        gradient = np.stack([rest.sum(1), rest @ feature - ridge * at[:, 1]], 1)
        if np.abs(gradient).max(initial=0.0) < 1e-9:
            break
        h00, h01, h11 = curvature.sum(1), curvature @ feature, curvature @ feature**2 + ridge
        determinant = h00 * h11 - h01**2
        step = np.stack([h11 * gradient[:, 0] - h01 * gradient[:, 1], h00 * gradient[:, 1] - h01 * gradient[:, 0]], 1)
        # A concave objective: a step of bounded length does not run away where the curvature is small.
        at += np.clip(step / determinant[:, None], -1.0, 1.0)
    theta[open_rows], phi[open_rows] = at.T
    return theta, phi


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def length_controlled_win_rate(
    a: ArrayLike,
    b: ArrayLike,
    length_a: ArrayLike,
    length_b: ArrayLike,
    *,
    coupled: bool,
    ridge: float = RIDGE,
    resamples: int = RESAMPLES,
) -> LengthControlled:
    """LC = sigma(theta) of logit P(a wins) = theta + phi tanh(dlen / sd(dlen)), the win rate at equal length.

    dlen = length_a - length_b of each comparison (the pairs of `pairs_of`; a tie is half a win); fitted by maximum
    likelihood with ridge / 2 phi^2, each prompt with weight 1, and refitted in every bootstrap replicate over
    prompts; sd is the unit of dlen and keeps its value there. With several seeds each has its own fit.
    After Dubois et al. 2024 (length-controlled AlpacaEval), eq. 2, without its terms of instruction difficulty.

    Args:
        a, length_a: (P, A) or (S, P, A). b, length_b: (P, B) or (S, P, B).
        coupled: both sides were sampled with the same random numbers.

    Returns:
        Undefined, with the reason, if 0 is not inside the range of dlen: equal length would be extrapolated.

    Raises:
        ValueError: where shapes do not match; see `pairs_of`.
    """
    sides = [np.asarray(x, dtype=np.float64) for x in (a, b, length_a, length_b)]
    one, other, long, short = (x[None] if x.ndim == 2 else x for x in sides)
    if one.shape != long.shape or other.shape != short.shape or one.shape[:2] != other.shape[:2]:
        raise ValueError(
            f"found figures {one.shape}, {other.shape} and lengths {long.shape}, {short.shape}; "
            "expected a length for each figure, and the same seeds and prompts on both sides"
        )
    compared = pairs_of(one.shape[-1], other.shape[-1], coupled)
    outcomes, gap = _outcomes(one, other, coupled), (long[..., :, None] - short[..., None, :])[..., compared]
    low, high = float(gap.min()), float(gap.max())
    if low == high:
        return LengthControlled(None, None, f"all comparisons have the same length difference, {low:g}")
    if low > 0 or high < 0:
        longer = "first" if low > 0 else "second"
        return LengthControlled(None, None, f"the {longer} side's responses are always longer")
    unit = np.unique(gap)
    feature = np.tanh(unit / gap.std())
    values, slopes, replicates = [], [], []
    for won, difference in zip(outcomes, gap, strict=True):
        weight, total = _cells(won, difference, unit)
        theta, phi = _fit(weight.sum(0, keepdims=True), total.sum(0, keepdims=True), feature, ridge)
        values.append(_sigmoid(theta)[0])
        slopes.append(phi[0])
        blocks = count_blocks(len(won), resamples=resamples)  # the same draws for every seed
        thetas = [_fit(counts @ weight, counts @ total, feature, ridge)[0] for counts in blocks]
        replicates.append(_sigmoid(np.concatenate(thetas)))
    agree = agreement(outcomes.mean((0, 2)))
    found = from_replicates(np.array(values), np.stack(replicates, 1), one.shape[1], null=0.5, agree=agree)
    return LengthControlled(found, float(np.mean(slopes)), None)
