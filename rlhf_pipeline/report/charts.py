"""Figures with their legends and captions, names with their markers, and intervals in table cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlhf_pipeline.report.drawing import Paint, draw
from rlhf_pipeline.report.figures import BEST_OF_N, Interval
from rlhf_pipeline.report.markup import Markup, h, join, linked
from rlhf_pipeline.report.style import Look, swatch
from rlhf_pipeline.report.text import NOTHING, interval_text, short
from rlhf_pipeline.report.view import View

WIDE = (940, 470)
NARROW = (350, 380)
PANEL = (350, 250)
LARGE = (420, 300)

Entry = tuple[Look, str, str | None]
"""An entry of a legend: look, name, kind of line (`line`, `dashed`, `thin`; None: a marker)."""


def named(look: Look, name: str) -> Markup:
    """A name beside a marker."""
    return h("span", swatch(look), short(name, 60), class_="arm")


def arm_name(view: View, arm: str) -> Markup:
    """An arm's name beside its marker."""
    return named(view.look(arm), view.called(arm))


def legend(entries: Iterable[Entry]) -> Markup:
    """A legend: markers and kinds of lines with their names."""
    made = []
    for look, name, kind in entries:
        key = swatch(look)
        if kind is not None:
            key = h("i", class_=f"key {kind}", style=f"color:{look.css}", aria_hidden="true")
        made.append(h("li", key, name))
    return h("ul", *made, class_="legend")


def arm_legend(view: View, arms: Iterable[str], *more: Entry) -> Markup:
    """The legend of the arms and further entries of a figure."""
    names = {arm: "best of n" if arm == BEST_OF_N else view.called(arm) for arm in arms}
    return legend([*((view.look(arm), name, None) for arm, name in names.items()), *more])


def both(ident: str, title: str, description: str, paint: Paint) -> Markup:
    """A figure drawn twice: for a wide page and for a narrow one; the style sheet shows the one that fits."""
    wide = draw(ident, title, description, paint, size=WIDE, class_="wide")
    return join([wide, draw(f"{ident}-narrow", title, description, paint, size=NARROW, class_="narrow")])


def panel(ident: str, title: str, description: str, paint: Paint, size: tuple[int, int] = PANEL) -> Markup:
    """One of several small figures."""
    return h("div", draw(ident, title, description, paint, size=size))


def panels(made: Sequence[Markup], *, large: bool = False) -> Markup:
    """Small figures side by side, as many as fit."""
    return h("div", *made, class_="panels pair" if large else "panels")


def plot(body: Markup, caption: str, files: Sequence[str], key: Markup) -> Markup:
    """A figure with its legend on top, and its caption and the links to its CSV files below."""
    return h("figure", key, body, h("figcaption", linked(caption, files)), class_="chart")


def interval_bar(found: Interval | None, low: float, high: float, look: Look, zero: float | None = None) -> Markup:
    """An interval on a scale from `low` to `high` that is the same for all rows of a table."""
    if found is None or high <= low:
        return h("span", NOTHING, class_="none")

    def at(value: float) -> str:
        return f"{6 + 148 * (min(max(value, low), high) - low) / (high - low):.1f}"

    parts = [h("path", d="M6 9H154", style="stroke:var(--grid);stroke-width:1")]
    if zero is not None and low <= zero <= high:
        parts.append(h("path", d=f"M{at(zero)} 1V17", style="stroke:var(--muted);stroke-width:1"))
    if found.ends is not None:
        line = f"M{at(found.ends[0])} 9H{at(found.ends[1])}"
        parts.append(h("path", d=line, style=f"stroke:{look.css};stroke-width:2.4;stroke-linecap:round"))
    parts.append(h("circle", cx=at(found.mean), cy="9", r="4", style=f"fill:{look.css}"))
    return h("svg", *parts, class_="bar", viewBox="0 0 160 18", role="img", aria_label=interval_text(found))


def span(found: Iterable[Interval | None], *also: float) -> tuple[float, float]:
    """The range that holds all intervals, and `also`."""
    values = [*also]
    for item in found:
        if item is not None:
            values += [item.mean, *(item.ends or ())]
    if not values:
        return 0.0, 0.0
    low, high = min(values), max(values)
    room = 0.04 * (high - low)
    return low - room, high + room
