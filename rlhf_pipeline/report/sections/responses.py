"""Length and diversity of the responses, as the policy moves away from the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_pipeline.report.markup import Column, Group, Markup, h, join, table
from rlhf_pipeline.report.palette import NEUTRAL
from rlhf_pipeline.report.parts import (
    PANEL,
    Section,
    arm_legend,
    arm_name,
    error_bars,
    mark,
    named,
    panels,
    plot,
    section,
)
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.svg import colour, draw, dress
from rlhf_pipeline.report.text import clean, count, finite, number, percent
from rlhf_pipeline.report.view import Reading, View, part, setting_csv, setting_key, setting_text

Row = Mapping[str, Any]

FIGURES = {
    "length": "length, tokens",
    "ended": "share ended by EOS",
    "well_formed": "share well formed",
    "entropy": "entropy, nats per response",
}
DIVERSITY = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_4": "distinct-4",
    "self_bleu": "self-BLEU",
}
SHARES = ("ended", "well_formed")
DIGITS = {"length": 2, "entropy": 2}


def _get(view: View, name: str) -> Callable[[Row], Reading | None]:
    if name in FIGURES:
        return lambda row: view.figure(row, name)

    def diversity(row: Row) -> Reading | None:
        value = finite(part(row, "diversity", name))
        return None if value is None else Reading(value)

    return diversity


def responses_section(view: View, points: Points) -> Section | None:
    """Panels of length, endings, entropy and diversity against KL, and their table."""
    present = {
        name: title
        for name, title in (FIGURES | DIVERSITY).items()
        if any(_get(view, name)(row) is not None for row in view.rows)
    }
    if not present:
        return None
    return section("responses", "Length and diversity", _panels(view, points, present), _table(view, present))


def _panels(view: View, points: Points, present: dict[str, str]) -> Markup | None:
    csv, made = [], []
    for number_of, (name, title) in enumerate(present.items()):
        get = _get(view, name)
        read = [(row, view.figure(row, "kl"), get(row)) for row in view.trained()]
        found = [(row, kl, value) for row, kl, value in read if kl is not None and value is not None]
        if len(found) < 2:
            continue
        csv += [
            [
                view.arm(row),
                setting_csv(row.get("setting")),
                row.get("seed"),
                row.get("name"),
                name,
                kl.mean,
                *value.cells,
            ]
            for row, kl, value in found
        ]
        made.append(_panel(view, f"responses-{number_of}", title, found))
    if not made:
        return None
    file = points.add("responses", ["arm", "setting", "seed", "model", "figure", "kl", "value", "low", "high"], csv)
    base = [row for row in view.trained() if view.is_baseline(row)]
    more: list[Any] = [(NEUTRAL, clean(base[0].get("name")), None)] if base else []
    caption = f"Each point is one model, placed by its KL to the reference. {view.basis()}"
    return plot(panels(made), caption, [file], arm_legend(view, view.arms, *more))


def _panel(view: View, ident: str, title: str, found: list[tuple[Row, Reading, Reading]]) -> Markup:
    def paint(axes: Any) -> None:
        dress(axes, "KL to the reference", title)
        for arm in view.arms:
            line = sorted((kl.mean, value.mean) for row, kl, value in found if view.arm(row) == arm)
            if len(line) > 1:
                axes.plot(*zip(*line), color=colour(view.look(arm).hue), lw=1.2, alpha=0.4, zorder=1)
        for row, kl, value in found:
            look = view.look_of(row)
            hue = colour(look.hue)
            error_bars(axes, Reading(kl.mean), value, hue)
            mark(axes, [kl.mean], [value.mean], look)

    values = [value.mean for _, _, value in found]
    description = f"{len(found)} models, from {number(min(values), 3)} to {number(max(values), 3)}."
    return h("div", draw(ident, f"{title.capitalize()} against KL", description, paint, size=PANEL))


def _table(view: View, present: dict[str, str]) -> Markup:
    """Means over the seeds of each setting."""

    def line(name: Any, rows: list[Row]) -> list[Any]:
        cells: list[Any] = [name]
        for figure in present:
            known = [value.mean for row in rows if (value := _get(view, figure)(row)) is not None]
            mean = sum(known) / len(known) if known else None
            cells.append(percent(mean) if figure in SHARES else number(mean, DIGITS.get(figure, 3)))
        return cells

    groups = [Group([line(named(NEUTRAL, row.get("name")), [row]) for row in view.trained() if view.is_baseline(row)])]
    for arm in view.arms:
        together: dict[tuple, list[Row]] = {}
        for row in view.trained():
            if view.arm(row) == arm and not view.is_baseline(row):
                together.setdefault(setting_key(row.get("setting")), []).append(row)
        lines = [
            line(join([arm_name(view, arm), " ", setting_text(rows[0].get("setting"))]), rows)
            for _, rows in sorted(together.items(), key=lambda entry: str(entry[0]))
        ]
        groups.append(Group(lines))
    best = [
        line(join([named(view.look_of(row), f"best of {number(row.get('n'), 0)}")]), [row]) for row in view.best_of_n()
    ]
    columns = [
        Column("model", False),
        *(Column(view.name_of(name) if name in FIGURES else title) for name, title in present.items()),
    ]
    shown = [group for group in [*groups, Group(best)] if group.rows]
    return table(columns, shown, label="Length and diversity", caption=_caption(view))


def _caption(view: View) -> str:
    seeds = "Means over the seeds of a setting. " if view.has_seeds() else ""
    found = {value for row in view.rows if (value := finite(part(row, "diversity", "tokens"))) is not None}
    return seeds + (
        f"Distinct-n and self-BLEU over {count(max(found))} tokens of each model." if found else view.basis()
    )
