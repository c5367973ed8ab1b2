"""Win rates between arms and against the baseline, and one ranking of all models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import isfinite

import numpy as np

from rlhf_pipeline.compare.arms import Arm, Setting, paired_by_seed, setting_key
from rlhf_pipeline.compare.rows import Measured
from rlhf_pipeline.evaluation.elo import rank
from rlhf_pipeline.evaluation.sampled import Samples
from rlhf_pipeline.evaluation.win_rates import (
    ONE_SAMPLE,
    length_controlled_win_rate,
    prompt_win_rates,
    tie_share,
    win_rate,
)
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.sides import ArmEntry, LengthControlled, Ranked, Ranking, WinRate

MOST_RANKED = 40

Side = tuple[np.ndarray, np.ndarray]
"""A figure and the length of every response of one side of a win rate, (S, P, N) each."""


def _setting(arm: Arm, described: Mapping[str, ArmEntry]) -> Setting:
    """The setting that represents an arm: the selected one, else the first."""
    chosen = described[arm.name].selected
    return arm.settings[0] if chosen is None else setting_key(chosen)


def _side(samples: Iterable[Samples], figure: str) -> Side:
    figures, lengths = zip(*((one.by_prompt(figure), one.by_prompt("length")) for one in samples), strict=True)
    return np.stack(figures), np.stack(lengths)


def win_rate_entry(names: tuple[str, str], figure: str, mine: Side, theirs: Side, *, coupled: bool) -> WinRate:
    """A win rate, plain and at equal length, with the share of ties, or the reason why there is none.

    Args:
        coupled: whether both sides are policies sampled with the same random numbers.
    """
    a, b = names
    if coupled and mine[0].shape[-1] < 2:
        none = LengthControlled(estimate=None, phi=None, why_not=ONE_SAMPLE)
        return WinRate(
            a=a, b=b, figure=figure, estimate=None, why_not=ONE_SAMPLE, ties=None, p=None, length_controlled=none
        )
    found = win_rate(mine[0], theirs[0], coupled=coupled)
    controlled = length_controlled_win_rate(mine[0], theirs[0], mine[1], theirs[1], coupled=coupled)
    finding = controlled.inference
    return WinRate(
        a=a,
        b=b,
        figure=figure,
        estimate=Interval.of(found.estimate),
        why_not=None,
        ties=tie_share(mine[0], theirs[0], coupled=coupled),
        p=found.p,
        length_controlled=LengthControlled(
            estimate=None if finding is None else Interval.of(finding.estimate),
            phi=controlled.phi,
            why_not=controlled.why_not,
        ),
    )


def win_rate_section(
    arms: Sequence[Arm],
    baseline: Measured,
    figure: str,
    described: Mapping[str, ArmEntry],
    demonstrations: Samples | None = None,
) -> list[WinRate]:
    """Win rates of every arm against every other, the baseline and the demonstrations, by one figure, at the arms'
    settings."""
    entries = []
    for a, b in combinations(arms, 2):
        one, other, seeds = paired_by_seed(a, b)
        if seeds:
            points = [arm.points[_setting(arm, described)] for arm in (one, other)]
            coupled = points[0][seeds[0]].test.coupled
            mine, theirs = (_side([found[seed].test for seed in seeds], figure) for found in points)
            entries.append(win_rate_entry((a.name, b.name), figure, mine, theirs, coupled=coupled))
    for arm in arms:
        found = arm.points[_setting(arm, described)].values()
        if all(point.name == baseline.name for point in found):
            continue
        mine, theirs = (
            _side((point.test for point in found), figure),
            _side((baseline.scored_by(point.scorer) for point in found), figure),
        )
        names = (arm.name, baseline.name)
        entries.append(win_rate_entry(names, figure, mine, theirs, coupled=baseline.test.coupled))
        if demonstrations is not None and figure in demonstrations.values:
            shown = _side([demonstrations] * len(found), figure)
            entries.append(win_rate_entry((arm.name, "demonstrations"), figure, mine, shown, coupled=False))
    return entries


def ranking_section(measured: Sequence[Measured], figure: str) -> Ranking | None:
    """Elo of every model with an interval over prompts, the baseline at 1000, and the share of ties in its comparisons.

    None with fewer than two models, or with one random sample per prompt (see `win_rates.pairs_of`).

    If there are too many models, final models are kept first, then the best snapshots.
    """
    known = {one.name: one for one in [*measured[1:], measured[0]]}  # the baseline takes precedence
    distinct = [measured[0], *(one for one in known.values() if one is not measured[0])]
    distinct.sort(
        key=lambda one: (one.point.step is not None, -one.values(figure).mean() if one.point.step is not None else 0.0)
    )
    distinct = distinct[:MOST_RANKED]
    if len(distinct) < 2 or (figure == "score" and len({one.scorer for one in distinct}) > 1):
        return None  # scores of different reward models have no common scale
    figures, size = [one.test.by_prompt(figure) for one in distinct], len(distinct)
    coupled = measured[0].test.coupled
    if coupled and figures[0].shape[1] < 2:
        return None
    wins, ties = np.zeros((len(figures[0]), size, size)), np.zeros((size, size))
    for i, j in combinations(range(size), 2):
        wins[:, i, j] = prompt_win_rates(figures[i], figures[j], coupled=coupled)
        wins[:, j, i] = 1 - wins[:, i, j]
        ties[i, j] = ties[j, i] = tie_share(figures[i], figures[j], coupled=coupled)
    found = rank(wins, baseline=0)
    places = sorted(range(size), key=lambda i: -found[i].elo.mean)
    return Ranking(
        figure=figure,
        separable=any(item.bound is not None for item in found),
        left_out=max(0, len({one.name for one in measured}) - MOST_RANKED),
        rows=[
            Ranked(
                name=distinct[i].name,
                arm=distinct[i].point.arm,
                step=distinct[i].point.step,
                elo=Interval.of(found[i].elo) if isfinite(found[i].elo.mean) else None,
                bound=found[i].bound,
                ties=float(ties[i].sum() / (size - 1)),
            )
            for i in places
        ],
    )
