"""How well the reward model and DPO's implicit reward tell held-out pairs apart, and whether they know how well."""

from __future__ import annotations

from typing import Any

from rlhf_pipeline.report.markup import Column, Group, Markup, h, table
from rlhf_pipeline.report.parts import (
    Section,
    estimate,
    interval_bar,
    legend,
    mark,
    named,
    panels,
    plot,
    section,
    span,
)
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.svg import colour, draw, dress
from rlhf_pipeline.report.text import clean, count, number, probability
from rlhf_pipeline.report.view import View, items, part, reading, tuples

SIZE = (420, 360)


def preferences_section(view: View, points: Points) -> Section | None:
    """Accuracy and calibration on held-out pairs."""
    scorers = items(view.get("preferences", "scorers"))
    if not scorers:
        return None
    pairs, prompts = view.get("preferences", "pairs"), view.get("preferences", "prompts")
    basis = f"{count(pairs)} held-out pairs of {count(prompts)} prompts" if pairs and prompts else "held-out pairs"
    found = {name: reading(part(entry, "accuracy")) for name, entry in scorers}
    scale = span(found.values(), 0.5)
    lines = [
        [
            named(view.look(view.kind(name)), view.title_of_model(name)),
            estimate(found[name], 3),
            interval_bar(found[name], *scale, view.look(view.kind(name)), 0.5),
            *(number(part(entry, figure), 3) for figure in ("ece", "nll", "brier")),
        ]
        for name, entry in scorers
    ]
    columns = [
        Column("scorer", False),
        Column("accuracy"),
        Column("95 % interval", False),
        Column("ECE", hint="expected calibration error: 0 is best"),
        Column("NLL", hint="log loss; 0.693 is a coin"),
        Column("Brier", hint="squared error of the probability; 0.25 is a coin"),
    ]
    caption = (
        f"{basis}; accuracy counts ties one half, its interval is clustered by prompt; the upright line is chance."
    )
    made = table(columns, [Group(lines)], label="Accuracy and calibration", caption=caption)
    return section(
        "preferences",
        "Telling good from bad: reward model and DPO",
        made,
        _test(view),
        _reliability(view, points, basis),
    )


def _test(view: View) -> Markup | None:
    test = view.get("preferences", "test")
    difference = reading(part(test, "difference"))
    if difference is None:
        return None
    ends = difference.interval
    sure = ends is not None and (ends[0] > 0 or ends[1] < 0)
    said = "the interval excludes a tie" if sure else "they cannot be told apart"
    text = (
        f"{clean(part(test, 'name') or 'difference')}: {difference.text(3)}, p {probability(part(test, 'p'))} "
        f"({clean(part(test, 'method') or 'test')}); {said}."
    )
    return h("p", text)


def _reliability(view: View, points: Points, basis: str) -> Markup | None:
    bins = {name: tuples(part(entry, "bins"), 3) for name, entry in items(view.get("preferences", "scorers"))}
    bins = {name: found for name, found in bins.items() if found}
    if not bins:
        return None
    file = points.add(
        "calibration",
        ["scorer", "confidence", "accuracy", "pairs"],
        [[name, *row] for name, found in bins.items() for row in found],
    )
    kinds = dict.fromkeys(view.kind(name) for name in bins)
    low = min([0.5, *(value for found in bins.values() for row in found for value in row[:2])])
    made = []
    for index, kind in enumerate(kinds):
        ours = {name: found for name, found in bins.items() if view.kind(name) == kind}
        made.append(_panel(view, f"reliability-{index}", _named(view, kind), ours, low))
    key = legend([*((view.look(kind), _named(view, kind), None) for kind in kinds), (None, "calibrated", "dashed")])
    caption = (
        f"{basis}, in bins of equal size by confidence; larger markers hold more pairs, one line for each model. On "
        "the dashed line a scorer is right as often as it says; below it is too sure of itself, above it not sure "
        "enough."
    )
    return plot(panels(made, large=True), caption, [file], key)


def _named(view: View, kind: str) -> str:
    return f"{kind}, implicit reward" if kind in view.arms else kind


def _panel(view: View, ident: str, name: str, bins: dict[str, list[tuple[float, ...]]], low: float) -> Markup:
    most = max(size for found in bins.values() for *_, size in found) or 1

    def paint(axes: Any) -> None:
        dress(axes, "confidence: the probability it gave", f"{name}: share of pairs it got right")
        axes.plot([low, 1], [low, 1], color=colour("muted"), lw=1.2, dashes=(4, 3), zorder=1)
        for label, found in bins.items():
            look = view.look(view.kind(label))
            hue = colour(look.hue)
            x, y, sizes = zip(*found)
            axes.plot(x, y, color=hue, lw=1.5, alpha=0.7, zorder=2)
            for at, right, size in zip(x, y, sizes):
                mark(axes, [at], [right], look, size=4 + 3 * size / most)
        room = 0.03 * (1 - low)
        axes.set_xlim(low - room, 1 + room)
        axes.set_ylim(low - room, 1 + room)

    ends = "; ".join(
        f"{clean(label)}: {len(found)} bins, the surest says {number(found[-1][0])} and is right {number(found[-1][1])}"
        for label, found in bins.items()
    )
    return h("div", draw(ident, f"Reliability of {name}", f"{ends}.", paint, size=SIZE))
