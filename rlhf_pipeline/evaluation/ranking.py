"""One scale for several models: Bradley-Terry strengths from their wins over one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_pipeline.evaluation.resampling import RESAMPLES, draw_counts
from rlhf_pipeline.evaluation.seeds import Finding, from_replicates

ELO = 400 / math.log(10)
"""Elo points per unit of log-odds: 400 points are odds of ten to one."""

ANCHOR = 1000.0

RIDGE = 1e-2
"""On the centred strengths, where no maximum exists; in units of comparisons."""

NEWTON_STEPS = 100


@dataclass(frozen=True)
class Ranking:
    """Elo of each model. separable: some models never lost to the others, so that their distance is the ridge's."""

    elo: list[Finding]
    separable: bool


def _connected(wins: np.ndarray) -> bool:
    """Whether a path of wins leads from every model to every other: then and only then is the maximum finite and
    unique (Ford 1957). wins: (k, k)."""
    from scipy.sparse.csgraph import connected_components

    return connected_components(wins > 0, directed=True, connection="strong")[0] == 1


def bradley_terry(wins: Any) -> np.ndarray:
    """Strengths s, mean 0, that maximise sum over i, j of w_ij log sigma(s_i - s_j).

    Concave; Newton's method with bounded steps. Where a maximum does not exist (a group of models that never lost to
    the rest) a ridge RIDGE / 2 |s|^2 decides; nowhere else is there one.
    (Bradley and Terry 1952; existence: Ford 1957.)

    Args:
        wins: (k, k) or (..., k, k): w_ij, how often i beat j; fractions allowed, ties as half a win for each.

    Returns:
        (k,) or (..., k), in log-odds.

    Raises:
        ValueError: for other shapes, negative wins, or models that no chain of comparisons joins.
    """
    table = np.asarray(wins, dtype=np.float64)
    if table.ndim < 2 or table.shape[-1] != table.shape[-2] or table.shape[-1] < 2 or (table < 0).any():
        raise ValueError(f"found wins of shape {table.shape}, expected (k, k) with k >= 2 and nothing negative")
    size = table.shape[-1]
    table = np.where(np.eye(size, dtype=bool), 0.0, table)
    games = table + np.swapaxes(table, -1, -2)
    flat, played = table.reshape(-1, size, size), games.reshape(-1, size, size)
    if not all(_connected(one) for one in np.unique(played > 0, axis=0)):
        raise ValueError("found models that no chain of comparisons joins, expected each to be compared")
    patterns, which = np.unique(flat > 0, axis=0, return_inverse=True)
    ridge = np.array([0.0 if _connected(one) else RIDGE for one in patterns])[which.ravel()]
    s = np.zeros((len(flat), size))
    won = flat.sum(2)
    scale = np.maximum(played.sum((1, 2)), 1.0)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(s[:, None, :] - s[:, :, None]))
        gradient = won - (played * p).sum(2) - ridge[:, None] * s
        if (np.abs(gradient).max(1) < 1e-11 * scale).all():
            break
        laplacian = -played * p * (1 - p)
        diagonal = ridge[:, None] - laplacian.sum(2)
        # The all-ones direction changes nothing; curvature along it makes the system solvable.
        hessian = laplacian + np.eye(size) * diagonal[:, None, :] + diagonal.mean(1)[:, None, None] / size
        s += np.clip(np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0], -1.0, 1.0)
        s -= s.mean(1, keepdims=True)
    return s.reshape(table.shape[:-1])


def rank(
    wins: Any,
    *,
    baseline: int | None = None,
    fixed_prompts: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ranking:
    """Elo of k models, 400 / ln 10 points per unit of log-odds, refitted in every bootstrap replicate over prompts.

    The models' mean is 1000 by default: no model's interval is then empty by definition. With `baseline` that model
    stands at 1000 and every interval is one of the distance to it.

    Args:
        wins: (P, k, k) or (S, P, k, k): the share of comparisons on a prompt that i won against j
            (`win_rates.prompt_win_rates`), 0 where they were not compared.

    Raises:
        ValueError: see `bradley_terry`; in a replicate as well, if only few prompts join the models.
    """
    table = np.asarray(wins, dtype=np.float64)
    table = table[None] if table.ndim == 3 else table
    if table.ndim != 4 or table.shape[-1] != table.shape[-2]:
        raise ValueError(f"found wins of shape {table.shape}, expected (prompts, k, k) or (seeds, prompts, k, k)")
    prompts, size = table.shape[1:3]

    def elo(totals: np.ndarray) -> np.ndarray:
        strengths = bradley_terry(totals)
        zero = strengths[..., baseline, None] if baseline is not None else 0.0
        return ANCHOR + ELO * (strengths - zero)

    totals = table.sum(1)
    counts = draw_counts(prompts, resamples=resamples, seed=seed)
    drawn = np.stack([(counts @ one.reshape(prompts, -1)).reshape(-1, size, size) for one in table], 1)
    values, replicates = elo(totals), elo(drawn)
    found = [
        from_replicates(values[:, i], replicates[:, :, i], prompts, fixed_prompts=fixed_prompts, null=ANCHOR)
        for i in range(size)
    ]
    return Ranking(found, not all(_connected(np.where(np.eye(size, dtype=bool), 0.0, one)) for one in totals))
