"""Differences between arms, with intervals: as trained, at one beta, at matched KL, at matched cost, as selected.

Arms are paired by seed and prompt. One contrast is declared beforehand (`primary_contrast`); the p-values of the others
are corrected for their number (Holm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from rlhf_pipeline.compare.arms import Arm, Seeds, Setting, arms_of, common_seeds, paired_by_seed
from rlhf_pipeline.compare.frontiers import frontier_section, over_optimisation_section
from rlhf_pipeline.compare.rankings import ranking_section, win_rate_section
from rlhf_pipeline.compare.rows import Measured, bill
from rlhf_pipeline.config.base import spelled
from rlhf_pipeline.evaluation.frontier import Curve, area_between, common_range, difference_at
from rlhf_pipeline.evaluation.sampled import SHARES, Samples
from rlhf_pipeline.evaluation.seeds import Inference, contrast, holm, infer
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import Cost, Exact, Interval
from rlhf_pipeline.report.sides import ArmEntry, Contrast, ContrastKind, Sides, Summary

SPREAD = 1.2
"""An arm has a curve of reward against cost if its largest cost is at least this many times its smallest."""

NO_RANGE = (
    "all points of an arm cost about the same: there is no range of cost (for snapshots, which give a range, set "
    "snapshot_steps in training and snapshots: true in the comparison)"
)

NOT_PAIRED = "no beta is that of exactly one setting of each arm"

NOT_CHOSEN = (
    "several settings cost the same; to choose one of them, the comparison needs validation prompts and a judge or a "
    "reward model"
)

FIGURES = ("true_reward", "judge", "score", "kl", "length")


def _entry(
    kind: ContrastKind, a: Arm, b: Arm, figure: str, at: str, found: Inference | None, why_not: str | None = None
) -> Contrast:
    return Contrast(
        name=f"{a.name} - {b.name}",
        kind=kind,
        a=a.name,
        b=b.name,
        figure=figure,
        at=at,
        estimate=None if found is None else Interval.of(found.estimate),
        why_not=why_not,
        p=None if found is None else found.p,
        p_holm=None,
        primary=False,
    )


def _beta_text(a: Arm, b: Arm, one: Setting, other: Setting) -> str:
    unlike = [arm.name for arm, setting in ((a, one), (b, other)) if arm.optimum(setting) != "same"]
    if unlike:
        return f"as trained, with a different optimum for {' and '.join(unlike)}"
    mine, theirs = a.beta(one), b.beta(other)
    if mine is None or theirs is None:
        return "as trained"
    return f"at beta {mine:g}" if mine == theirs else f"as trained ({a.name} at beta {mine:g}, {b.name} at {theirs:g})"


def _same_setting(a: Arm, b: Arm, seeds: Seeds, figures: Sequence[str]) -> Iterator[Contrast]:
    """Compare both arms at their only setting, or at each beta that both have."""
    pairs = [(one, other) for one in a.settings for other in b.settings]
    unlike = [arm.name for arm in (a, b) if any(arm.optimum(setting) != "same" for setting in arm.settings)]
    if len(pairs) > 1 and unlike:
        why = f"at one beta the optimum of {' and '.join(unlike)} is different; compare at matched KL"
        yield _entry("same beta", a, b, figures[0], "at one beta", None, why)
    if len(pairs) > 1:  # if more than beta was swept, the settings cannot be paired
        pairs = [(one, other) for one, other in pairs if a.beta(one) is not None and a.beta(one) == b.beta(other)]
        pairs = pairs if len({one for one, _ in pairs}) == len({other for _, other in pairs}) == len(pairs) else []
        if not pairs and not unlike:
            yield _entry("same beta", a, b, figures[0], "at one beta", None, NOT_PAIRED)
    kind: ContrastKind = "as trained" if len(pairs) == 1 else "same beta"
    for one, other in pairs:
        for figure in figures:
            found = contrast(a.values(one, seeds, figure), b.values(other, seeds, figure))
            yield _entry(kind, a, b, figure, _beta_text(a, b, one, other), found)


def chooser_of(measured: Sequence[Measured]) -> str | None:
    """The figure by which a setting is chosen: the judge's score, else the reward model's; never the true reward."""
    return next((name for name in ("judge", "score") if name in measured[0].test.values), None)


def selected_setting(arm: Arm, seeds: Seeds, chooser: str) -> Setting:
    """The setting with the best mean on the validation prompts, over seeds."""
    means = [arm.values(setting, seeds, chooser, "validation").mean() for setting in arm.settings]
    return arm.settings[int(np.argmax(means))]


def _selected(a: Arm, b: Arm, seeds: Seeds, figure: str, chooser: str) -> Contrast:
    one, other = (selected_setting(arm, seeds, chooser) for arm in (a, b))
    found = contrast(a.values(one, seeds, figure), b.values(other, seeds, figure))
    chosen = "; ".join(f"{arm.name}: {_setting_text(setting)}" for arm, setting in ((a, one), (b, other)))
    return _entry(
        "selected", a, b, figure, f"with settings chosen on validation prompts by the {chooser} ({chosen})", found
    )


def _setting_text(setting: Setting) -> str:
    return ", ".join(f"{name} {spelled(value)}" for name, value in setting.values.items()) or "only setting"


def _cost(registry: Registry, arm: Arm, seeds: Seeds, settings: Sequence[Setting]) -> np.ndarray:
    """FLOPs of each point, (S, G); NaN if the cost is not known."""
    bills = [[bill(registry, arm.points[setting][seed].model) for setting in settings] for seed in seeds]
    return np.array([[np.nan if one is None else one.flops for one in row] for row in bills])


def _at_equal_cost(a: Arm, b: Arm, seeds: Seeds, figure: str, chooser: str | None, registry: Registry) -> Contrast:
    """Compare a figure at one cost that both arms reach, on the Pareto-optimal points of each arm."""

    def entry(found: Inference | None = None, why_not: str | None = None, at: str = "at equal FLOPs") -> Contrast:
        return _entry("cost", a, b, figure, at, found, why_not)

    curves = []
    for arm in (a, b):
        known = arm.complete(seeds)
        cost = _cost(registry, arm, seeds, known)
        if not np.isfinite(cost).all():
            unknown = {arm.points[known[j]][seeds[i]].name for i, j in np.argwhere(~np.isfinite(cost))}
            return entry(why_not=f"the cost of a point is not known ({sorted(unknown)[0]})")
        if cost.max() < SPREAD * cost.min():
            return entry(why_not=NO_RANGE)
        if len(arm.finals.settings) > 1 and (chooser is None or not arm.validated):
            return entry(why_not=NOT_CHOSEN)
        chosen = arm.envelope(seeds, chooser, cost)
        spent = cost[:, [known.index(setting) for setting in chosen]]
        curves.append(Curve.of(spent, arm.stacked(seeds, figure, settings=chosen)))
    one, other = curves
    found = difference_at(one, other, names=(a.name, b.name))
    return entry(found.inference, found.why_not, "at equal FLOPs" if found.at is None else f"at {found.at:.3g} FLOPs")


def _matched(a: Arm, b: Arm, seeds: Seeds, figure: str, chooser: str | None, registry: Registry) -> Iterator[Contrast]:
    """Compare a figure at one KL that both arms reach, on average over their common range of KL, and at equal FLOPs.

    What is at a KL is read from samples of the policies themselves, whatever decoder makes the responses.
    """
    names = (a.name, b.name)
    one, other = (arm.sampled.curve(seeds, figure, chooser) for arm in (a, b))
    found = difference_at(one, other, names=names)
    text = "at matched KL" if found.at is None else f"at a KL of {found.at:.2f} nats"
    yield _entry("matched KL", a, b, figure, text, found.inference, found.why_not)
    shared = common_range(one, other)
    found = area_between(one, other, names=names)
    text = "on average over the KLs that both reach"
    if shared is not None:
        text = f"on average over KLs from {shared[0]:.2f} to {shared[1]:.2f} nats"
    yield _entry("area", a, b, figure, text, found.inference, found.why_not)
    yield _at_equal_cost(a, b, seeds, figure, chooser, registry)


def contrasts_of(
    a: Arm, b: Arm, figures: Sequence[str], chooser: str | None, swept: bool, registry: Registry
) -> list[Contrast]:
    """All contrasts of two arms: those of the final models, and at matched KL and cost those of the snapshots too.

    Args:
        swept: whether an arm has final models at several settings.
    """
    a, b, seeds = paired_by_seed(a, b)
    if not seeds:
        return [_entry("as trained", a, b, figures[0], "as trained", None, "the arms have no seeds in common")]
    finals = a.finals, b.finals
    found = list(_same_setting(*finals, seeds, figures))
    if (swept or a.snapshots or b.snapshots) and "kl" in figures:
        judged = [figure for figure in figures if figure in ("true_reward", "judge")] or figures[:1]
        found += [entry for figure in judged for entry in _matched(a, b, seeds, figure, chooser, registry)]
        if swept and chooser is not None and a.validated and b.validated:
            found.append(_selected(*finals, seeds, figures[0], chooser))
    return found


def _exact(a: Arm, b: Arm, objectives: Mapping[str | None, float]) -> Iterator[Contrast]:
    """Compare the exact objective at each beta that both arms have: no sampling error, these prompts, t over seeds."""
    a, b, seeds = paired_by_seed(a, b)
    for one in a.settings:
        for other in b.settings:
            beta = a.beta(one)
            if not seeds or beta is None or beta != b.beta(other):
                continue
            sides = [
                [objectives[arm.points[setting][seed].name] for seed in seeds]
                for arm, setting in ((a, one), (b, other))
            ]
            text = f"at beta {beta:g}, on these prompts"
            if len(seeds) > 1:
                yield _entry("exact", a, b, "objective", text, contrast(*sides))
            else:
                why = f"the exact difference is {sides[0][0] - sides[1][0]:+.3f}; one seed gives no interval"
                yield _entry("exact", a, b, "objective", text, None, why)


def _declared(entries: Sequence[Contrast], wanted: str, primary: str, swept: bool) -> list[Contrast]:
    """Mark one contrast as primary and correct the p-values of the others for their number (Holm)."""
    if wanted == "auto":
        matched = swept and any(entry.kind == "matched KL" for entry in entries)
        wanted = "matched_kl" if matched else "as_trained"  # snapshots do not change the primary contrast
    kinds = {"matched_kl": ("matched KL",), "selected": ("selected",), "as_trained": ("as trained", "same beta")}
    order = [kinds[wanted], *(kind for kind in kinds.values() if kind != kinds[wanted])]
    found = (entry for kind in order for entry in entries if entry.kind in kind and entry.figure == primary)
    first = next(found, None)
    corrected = iter(holm([entry.p for entry in entries if entry is not first]))
    return [
        entry.model_copy(update={"primary": True} if entry is first else {"p_holm": next(corrected)})
        for entry in entries
    ]


def _effective_beta(arm: Arm, setting: Setting) -> float | None:
    """The mean over seeds of the effective beta; None if one of them is not known."""
    found = [one.aim.effective_beta for one in arm.points[setting].values()]
    known = [beta.mean for beta in found if beta is not None and beta.mean is not None]
    return float(np.mean(known)) if len(known) == len(found) else None


def summary_of(arms: Sequence[Arm]) -> list[Summary]:
    """Summarise every figure of every arm and setting over its seeds and prompts."""
    rows = []
    for arm in arms:
        for setting in arm.settings:
            seeds = arm.seeds(setting)
            names = arm.points[setting][seeds[0]].test.values
            found = {name: infer(arm.values(setting, seeds, name), share=name in SHARES).estimate for name in names}
            rows.append(
                Summary(
                    arm=arm.name,
                    setting=setting.values,
                    beta=arm.beta(setting),
                    optimum=arm.optimum(setting),
                    effective_beta=_effective_beta(arm, setting),
                    seeds=len(seeds),
                    metrics=Interval.table(found),
                    method=next(iter(found.values())).method,
                )
            )
    return rows


def _described(arm: Arm, chooser: str | None, registry: Registry) -> ArmEntry:
    """Describe how an arm was tuned, and its mean cost over seeds; snapshots do not count as trials."""
    finals, seeds = arm.finals, common_seeds(arm)
    selected = None
    if len(finals.settings) > 1 and chooser and seeds and finals.validated:
        selected = selected_setting(finals, seeds, chooser)
    chosen = selected if selected is not None else finals.settings[0]
    bills = [found for one in finals.points[chosen].values() if (found := bill(registry, one.model)) is not None]
    cost = None
    if len(bills) == len(finals.points[chosen]):
        cost = Cost(**{key: float(np.mean([getattr(one, key) for one in bills])) for key in Cost.model_fields})
    return ArmEntry(
        trials=len(finals.settings),
        snapshots=arm.snapshots,
        settings=[setting.values for setting in finals.settings],
        selected=None if selected is None else selected.values,
        cost=cost,
    )


def compare_arms(
    measured: Sequence[Measured],
    baseline: Measured,
    primary: str | None,
    declared: str,
    registry: Registry,
    *,
    exact: Exact | None = None,
    demonstrations: Samples | None = None,
    reference: Measured | None = None,
) -> Sides:
    """Compare the arms with each other, with the baseline and with the demonstrations.

    Args:
        primary: the figure that measures how good a response is. declared: `primary_contrast` of the config.
        reference: the model that KL is measured to.
    """
    arms = arms_of(measured)
    finals = [arm.finals for arm in arms]
    if primary is None:
        return Sides(summary=summary_of(finals), arms={}, contrasts=[])
    figures = [primary, *(name for name in FIGURES if name != primary and name in measured[0].test.values)]
    swept = any(len(arm.settings) > 1 for arm in finals)
    chooser = chooser_of(measured)
    entries = [
        entry for a, b in combinations(arms, 2) for entry in contrasts_of(a, b, figures, chooser, swept, registry)
    ]
    if exact is not None:
        objectives = {row.model: row.objective for row in exact.rows}
        entries += [entry for a, b in combinations(finals, 2) for entry in _exact(a, b, objectives)]
    described = {arm.name: _described(arm, chooser, registry) for arm in arms}
    return Sides(
        summary=summary_of(finals),
        arms=described,
        contrasts=_declared(entries, declared, primary, swept),
        win_rates=win_rate_section(finals, baseline, primary, described, demonstrations),
        ranking=ranking_section([baseline, *measured], primary),
        frontier=frontier_section(arms, primary, chooser, exact),
        overoptimisation=over_optimisation_section(arms, reference),
    )
