"""Who wins against whom: win rates between arms and against the baseline, and one ranking of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_pipeline.evaluation.ranking import rank
from rlhf_pipeline.evaluation.sampled import Samples
from rlhf_pipeline.evaluation.win_rates import length_controlled_win_rate, prompt_win_rates, win_rate
from rlhf_pipeline.experiment.rows import Measured
from rlhf_pipeline.experiment.tables import Arm, Setting, paired_by_seed, setting_key

MOST_RANKED = 40

Side = tuple[np.ndarray, np.ndarray]
"""(S, P, N) a figure and the length of every response of one side of a win rate."""


def _setting(arm: Arm, described: Mapping[str, Any]) -> Setting:
    """The setting that speaks for an arm: the selected one, else its first."""
    chosen = described[arm.name]["selected"]
    return arm.settings[0] if chosen is None else setting_key(chosen)


def _side(arm: Arm, setting: Setting, seeds: Sequence[int | None], figure: str) -> Side:
    return arm.samples(setting, seeds, figure), arm.samples(setting, seeds, "length")


def _stacked(samples: Sequence[Samples], figure: str) -> np.ndarray:
    return np.stack([one.values[figure].reshape(len(one.examples), -1) for one in samples])


def _entry(a: str, b: str, figure: str, mine: Side, theirs: Side) -> dict[str, Any]:
    found = win_rate(mine[0], theirs[0])
    controlled = length_controlled_win_rate(mine[0], theirs[0], mine[1], theirs[1])
    return {
        "a": a,
        "b": b,
        "figure": figure,
        "estimate": found.estimate.as_dict(),
        "p": found.p,
        "length_controlled": {
            "estimate": None if controlled.finding is None else controlled.finding.estimate.as_dict(),
            "phi": controlled.phi,
            "why_not": controlled.why_not,
        },
    }


def win_rate_section(
    arms: Sequence[Arm],
    baseline: Measured,
    figure: str,
    described: Mapping[str, Any],
    demonstrations: Samples | None = None,
) -> list[dict[str, Any]]:
    """Win rates of every arm against every other, the baseline and the demonstrations, by one figure, at the arms'
    settings."""
    entries = []
    for a, b in combinations(arms, 2):
        one, other, seeds = paired_by_seed(a, b)
        if seeds:
            mine, theirs = (_side(arm, _setting(arm, described), seeds, figure) for arm in (one, other))
            entries.append(_entry(a.name, b.name, figure, mine, theirs))
    others = [(baseline.name, baseline.test)]
    if demonstrations is not None and figure in demonstrations.values:
        others.append(("demonstrations", demonstrations))
    for arm in arms:
        setting = _setting(arm, described)
        if all(point is baseline or point.name == baseline.name for point in arm.points[setting].values()):
            continue
        mine = _side(arm, setting, arm.seeds(setting), figure)
        for name, samples in others:
            seen = [
                baseline.scored_by(point.scorer) if samples is baseline.test else samples
                for point in arm.points[setting].values()
            ]
            theirs = _stacked(seen, figure), _stacked(seen, "length")
            entries.append(_entry(arm.name, name, figure, mine, theirs))
    return entries


def ranking_section(measured: Sequence[Measured], figure: str) -> dict[str, Any] | None:
    """Elo of every model with an interval over prompts, the baseline at 1000; None with fewer than two models.

    Where there are too many, final models come before snapshots, and of these the best.
    """
    known = {one.name: one for one in [*measured[1:], measured[0]]}  # the baseline as itself, whatever arm it is of
    distinct = [measured[0], *(one for one in known.values() if one is not measured[0])]
    distinct.sort(
        key=lambda one: (one.point.step is not None, -one.values(figure).mean() if one.point.step is not None else 0.0)
    )
    distinct = distinct[:MOST_RANKED]
    if len(distinct) < 2 or (figure == "score" and len({one.scorer for one in distinct}) > 1):
        return None  # scores of different reward models have no common scale
    shape = (len(distinct[0].test.examples), -1)
    figures = [one.test.values[figure].reshape(shape) for one in distinct]
    wins = np.zeros((shape[0], len(distinct), len(distinct)))
    for i, mine in enumerate(figures):
        for j, theirs in enumerate(figures):
            if i != j:
                wins[:, i, j] = prompt_win_rates(mine, theirs)
    found = rank(wins, baseline=0)
    rows = [
        {"name": one.name, "arm": one.point.arm, "step": one.point.step, "elo": item.estimate.as_dict()}
        for one, item in zip(distinct, found.elo, strict=True)
    ]
    return {
        "figure": figure,
        "separable": found.separable,
        "left_out": max(0, len({one.name for one in measured}) - MOST_RANKED),
        "rows": sorted(rows, key=lambda row: -row["elo"]["mean"]),
    }
