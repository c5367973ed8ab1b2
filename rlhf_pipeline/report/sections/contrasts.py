"""Differences between arms and win rates, as tables with their intervals drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.report.markup import Column, Group, Markup, details, h, join, table
from rlhf_pipeline.report.parts import estimate, interval_bar, linked, span
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import NOTHING, clean, percent, probability
from rlhf_pipeline.report.view import Reading, View, part, reading, records

COLUMNS = (
    Column("contrast", False),
    Column("figure", False),
    Column("where", False),
    Column("difference"),
    Column("95 % interval", False),
    Column("p"),
    Column("p (Holm)"),
)
FEW = 12
"""Contrasts that are shown without being asked for; of more only those in the figures that decide."""

Entry = Mapping[str, Any]


def contrasts_table(view: View, points: Points) -> Markup | None:
    """Differences between arms, with p-values."""
    found = [(entry, reading(entry.get("estimate"))) for entry in records(view.get("contrasts"))]
    if not found:
        return None
    found.sort(key=lambda pair: pair[0].get("primary") is not True)
    file = points.add(
        "contrasts",
        ["name", "a", "b", "figure", "at", "mean", "low", "high", "p", "p_holm", "primary"],
        [_csv(entry, item) for entry, item in found],
    )
    deciding = (view.primary, "judge")
    first = [pair for pair in found if len(found) <= FEW or pair[0].get("figure") in deciding]
    rest = [pair for pair in found if pair not in first]
    methods = sorted({item.method for _, item in found if item is not None and item.method})
    caption = linked(
        f"Difference of the first arm to the second with its 95 % interval{_how(methods)}, on one scale for each "
        "figure; the upright line is zero, the colour that of the arm with more. An interval that holds zero does "
        "not tell the arms apart. The primary contrast was declared beforehand; p (Holm) allows for having looked at "
        "the others.",
        [file],
    )
    more = None
    if rest:
        made = table(COLUMNS, [_lines(view, rest)], label="Contrasts in other figures")
        more = details(f"Contrasts in other figures ({len(rest)})", made, class_="unfold")
    made = table(COLUMNS, [_lines(view, first)], label="Contrasts", caption=caption)
    return join([h("h3", "Differences between the arms"), made, more])


def _how(methods: list[str]) -> str:
    return f" ({', '.join(methods)})" if methods else ""


def _csv(entry: Entry, item: Reading | None) -> list[Any]:
    ends = item.cells if item is not None else (None, None, None)
    known = [entry.get(key) for key in ("name", "a", "b", "figure", "at")]
    return [*known, *ends, entry.get("p"), entry.get("p_holm"), int(entry.get("primary") is True)]


def _lines(view: View, found: list[tuple[Entry, Reading | None]]) -> Group:
    scales = {
        str(entry.get("figure")): span([item for other, item in found if other.get("figure") == entry.get("figure")], 0)
        for entry, _ in found
    }
    lines, marked = [], set()
    for index, (entry, item) in enumerate(found):
        primary = entry.get("primary") is True
        if primary:
            marked.add(index)
        figure = str(entry.get("figure"))
        name = clean(entry.get("name") or f"{entry.get('a')} - {entry.get('b')}").replace(" - ", " − ")
        ahead = entry.get("a") if item is None or item.mean >= 0 else entry.get("b")
        value = estimate(item) if item is not None else h("span", entry.get("why_not") or NOTHING, class_="why")
        lines.append(
            [
                join([name, " ", h("span", "primary", class_="chip quiet") if primary else None]),
                h("span", view.name_of(figure), class_="tight"),
                h("span", entry.get("at") or NOTHING, class_="where"),
                value,
                interval_bar(item, *scales[figure], view.look(str(ahead)), 0.0),
                probability(entry.get("p")),
                probability(entry.get("p_holm")),
            ]
        )
    return Group(lines, marked=frozenset(marked))


def win_rates_table(view: View) -> Markup | None:
    """Win rates of pairs, plain and at equal length."""
    lines = []
    for entry in records(view.get("win_rates")):
        found, controlled = reading(entry.get("estimate")), reading(part(entry, "length_controlled", "estimate"))
        why = part(entry, "length_controlled", "why_not") or NOTHING
        lines.append(
            [
                f"{clean(entry.get('a'))} against {clean(entry.get('b'))}",
                view.name_of(str(entry.get("figure"))),
                estimate(found) if found is not None else h("span", entry.get("why_not") or NOTHING, class_="why"),
                percent(entry.get("ties"), 0),
                interval_bar(found, 0.0, 1.0, view.look(str(entry.get("a"))), 0.5),
                estimate(controlled) if controlled is not None else h("span", why, class_="why"),
            ]
        )
    if not lines:
        return None
    columns = [
        Column("pair", False),
        Column("by", False),
        Column("win rate"),
        Column("ties"),
        Column("from 0 to 1", False),
        Column("at equal length"),
    ]
    caption = (
        "How often a response scores higher than an independent one of the other's to the same prompt, ties one half, "
        "with its 95 % interval and the share of ties; the upright line is one half. At equal length: what a logistic "
        "model says of responses of one length, an association."
    )
    return join([h("h3", "Win rates"), table(columns, [Group(lines)], label="Win rates", caption=caption)])
