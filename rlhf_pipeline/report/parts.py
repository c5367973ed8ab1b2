"""What sections are made of: sections, figures with legend and caption, intervals drawn in a table's cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.report.markup import Markup, details, h, join, safe
from rlhf_pipeline.report.palette import NEUTRAL, Look, swatch
from rlhf_pipeline.report.svg import colour, draw
from rlhf_pipeline.report.text import NOTHING, number, short
from rlhf_pipeline.report.view import BEST_OF_N, Reading, View

WIDE = (940, 470)
NARROW = (350, 380)
PANEL = (350, 250)

SIZES = {"^": 1.3, "v": 1.3, "P": 1.25, "X": 1.2, "D": 0.92}
"""Markers that look smaller or larger than a circle of their size."""

FEW_ROWS = 12
"""Rows that a table may have without being folded away, where it is not what the report is about."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    ident: str
    title: str
    body: Markup

    def html(self) -> Markup:
        """The section as markup."""
        return h(
            "section",
            h("h2", self.title, id=f"{self.ident}-h"),
            self.body,
            id=self.ident,
            aria_labelledby=f"{self.ident}-h",
        )


def section(ident: str, title: str, *body: Any) -> Section | None:
    """A section of the parts that there are; None without any."""
    parts = [part for part in body if part is not None]
    return Section(ident, title, join(parts)) if parts else None


def arm_name(view: View, arm: str) -> Markup:
    """An arm's name beside its marker."""
    return named(view.look(arm), arm)


def named(look: Look, name: Any) -> Markup:
    """A name beside a marker."""
    return h("span", swatch(look), short(name, 60), class_="arm")


def legend(entries: Iterable[tuple[Look | None, Any, str | None]]) -> Markup:
    """Entries (look, name, kind): a marker, or with a kind of line (`line`, `dashed`, `thin`) that."""
    made = []
    for look, name, kind in entries:
        look = look or NEUTRAL
        mark = (
            swatch(look)
            if kind is None
            else h("i", class_=f"key {kind}", style=f"color:{look.css}", aria_hidden="true")
        )
        made.append(h("li", mark, name))
    return h("ul", *made, class_="legend")


def arm_legend(view: View, arms: Iterable[str], *more: tuple[Look | None, Any, str | None]) -> Markup:
    """The arms of a figure and what else is in it."""
    return legend([*((view.look(arm), "best of n" if arm == BEST_OF_N else arm, None) for arm in arms), *more])


def both(ident: str, title: str, description: str, paint: Callable[[Any], Any]) -> Markup:
    """A figure drawn twice: for a wide page and for a narrow one; the style sheet shows the one that fits."""
    return join(
        [
            draw(ident, title, description, paint, size=WIDE, class_="wide"),
            draw(f"{ident}-narrow", title, description, paint, size=NARROW, class_="narrow"),
        ]
    )


def panels(made: Sequence[Markup], *, large: bool = False) -> Markup | None:
    """Small figures side by side, as many as fit."""
    return h("div", *made, class_="panels pair" if large else "panels") if made else None


def folded(summary: str, rows: int, made: Markup) -> Markup:
    """A table as it is where it is short, else to open."""
    return made if rows <= FEW_ROWS else details(summary, made, class_="unfold")


def plot(body: Markup | None, caption: Any, files: Sequence[str], key: Markup | None = None) -> Markup | None:
    """A figure with its legend on top, and below what one sees and where its numbers are."""
    if body is None:
        return None
    return h("figure", key, body, h("figcaption", linked(caption, files)), class_="chart")


def linked(caption: Any, files: Sequence[str]) -> Markup:
    """A caption, and where the numbers are."""
    links = join([h("a", name, href=name) for name in files], ", ")
    return join([caption, " Points: ", links, "."]) if files else safe(caption)


def estimate(found: Reading | None, digits: int = 2) -> Markup:
    """A mean with its interval in smaller type."""
    if found is None:
        return h("span", NOTHING, class_="none")
    if found.interval is None:
        return h("b", number(found.mean, digits))
    ends = f"[{number(found.low, digits)}, {number(found.high, digits)}]"
    return join([h("b", number(found.mean, digits)), " ", h("span", ends, class_="ci")])


def interval_bar(found: Reading | None, low: float, high: float, look: Look, zero: float | None = None) -> Markup:
    """An interval on a scale from `low` to `high` that is the same for all rows of a table."""
    if found is None or high <= low:
        return h("span", NOTHING, class_="none")

    def at(value: float) -> str:
        return f"{6 + 148 * (min(max(value, low), high) - low) / (high - low):.1f}"

    parts = [h("path", d="M6 9H154", style="stroke:var(--grid);stroke-width:1")]
    if zero is not None and low <= zero <= high:
        parts.append(h("path", d=f"M{at(zero)} 1V17", style="stroke:var(--muted);stroke-width:1"))
    if found.interval is not None:
        line = f"M{at(found.interval[0])} 9H{at(found.interval[1])}"
        parts.append(h("path", d=line, style=f"stroke:{look.css};stroke-width:2.4;stroke-linecap:round"))
    parts.append(h("circle", cx=at(found.mean), cy="9", r="4", style=f"fill:{look.css}"))
    return h("svg", *parts, class_="bar", viewBox="0 0 160 18", role="img", aria_label=found.text())


def span(found: Iterable[Reading | None], *also: float) -> tuple[float, float]:
    """The range that holds all intervals, and `also`."""
    values = [*also]
    for item in found:
        if item is not None:
            values += [item.mean, *(item.interval or ())]
    if not values:
        return 0.0, 0.0
    low, high = min(values), max(values)
    room = 0.04 * (high - low)
    return low - room, high + room


def mark(
    axes: Any, x: Sequence[float], y: Sequence[float], look: Look, *, size: float = 6.5, filled: bool = True
) -> None:
    """Points in the colour and with the marker of what they belong to, set off from lines behind them."""
    hue, page = colour(look.hue), colour("page")
    size *= SIZES.get(look.marker, 1.0)
    face, edge, width = (hue, page, 0.7) if filled else (page, hue, 1.5)
    axes.plot(x, y, ls="", marker=look.marker, ms=size, mfc=face, mec=edge, mew=width, zorder=4)


def trail(axes: Any, line: Sequence[tuple[float, float]], look: Look) -> None:
    """The snapshots of a run, smaller and lighter than models, on a thin line that ends at the run's model."""
    hue, size = colour(look.hue), 4 * SIZES.get(look.marker, 1.0)
    x, y = zip(*line)
    axes.plot(x, y, color=hue, lw=0.9, alpha=0.4, zorder=1.6)
    axes.plot(x[:-1], y[:-1], ls="", marker=look.marker, ms=size, mfc=hue, mec="none", alpha=0.5, zorder=3)


def error_bars(axes: Any, x: Reading, y: Reading, hue: str) -> None:
    """The intervals of a point, thin, behind it."""
    if y.interval is not None:
        axes.plot([x.mean, x.mean], y.interval, color=hue, lw=1.1, alpha=0.45, zorder=2, solid_capstyle="butt")
    if x.interval is not None:
        axes.plot(x.interval, [y.mean, y.mean], color=hue, lw=1.1, alpha=0.45, zorder=2, solid_capstyle="butt")
