"""Drawing: markers, legends, intervals in table cells, and figures by matplotlib.

A figure becomes inline SVG with the font of the page, CSS variables as colours, and text as text.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.report.markup import Markup, h, join, linked
from rlhf_pipeline.report.results import BEST_OF_N, FrontierPoint, Interval, Row
from rlhf_pipeline.report.style import LIGHT, Look, swatch
from rlhf_pipeline.report.text import NOTHING, clean, interval_text, short
from rlhf_pipeline.report.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

SVG = "http://www.w3.org/2000/svg"
WIDE = (940, 470)
NARROW = (350, 380)
PANEL = (350, 250)
LARGE = (420, 300)

SIZES = {"^": 1.3, "v": 1.3, "P": 1.25, "X": 1.2, "D": 0.92}
"""Markers that look smaller or larger than a circle of their size."""

Ends = tuple[float, float] | None
Late = Callable[["Axes"], None]
Paint = Callable[["Axes"], Late | None]
Entry = tuple[Look, str, str | None]
"""An entry of a legend: look, name, kind of line (`line`, `dashed`, `thin`; None: a marker)."""

# matplotlib draws in placeholder colours, one for each CSS variable; `_attribute` replaces them by the variables.
_CODES = {name: f"#fe01{index:02x}" for index, name in enumerate(LIGHT)}
_NAMES = {code: name for name, code in _CODES.items()}

_SETTINGS: dict[RcKeyType, object] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "rlhf",
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the layout is the same on every machine
    "font.size": 12,
    "figure.dpi": 72,  # one unit of a figure is one CSS pixel
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": _CODES["line"],
    "axes.labelcolor": _CODES["muted"],
    "axes.titlecolor": _CODES["ink"],
    "text.color": _CODES["ink"],
    "xtick.color": _CODES["line"],
    "ytick.color": _CODES["line"],
    "xtick.labelcolor": _CODES["muted"],
    "ytick.labelcolor": _CODES["muted"],
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "grid.color": _CODES["grid"],
    "grid.linewidth": 1,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def colour(name: str) -> str:
    """The colour for matplotlib that becomes the CSS variable `name`."""
    return _CODES[name]


def draw(
    ident: str, title: str, description: str, paint: Paint, *, size: tuple[int, int], class_: str | None = None
) -> Markup:
    """One figure of width x height CSS pixels; `paint` may return a function to call after the layout is final.

    `ident` is unique in the page: all ids of the figure begin with it.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():  # the caller's settings are restored afterwards
        # The layout's font lacks many of the world's characters; the browser's fonts have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message=".*Matplotlib currently does not support")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        late = paint(axes)
        if late is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            late(axes)
        return _inline(figure, ident, title, description, class_)


def dress(axes: Axes, x: str, y: str) -> None:
    """Name the axes: x below, y on top, so that it is horizontal."""
    axes.set_xlabel(short(x, 60))
    axes.set_title(short(y, 60))
    axes.margins(0.06, 0.1)


def _inline(figure: Figure, ident: str, title: str, description: str, class_: str | None) -> Markup:
    """The figure as part of the page: no metadata, no namespaces, ids of its own, a title and a description."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    saved = re.sub("<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    root = ET.fromstring(saved)
    for item in root.iter():
        item.tag, item.tail = item.tag.rpartition("}")[2], None
        if item.tag != "text":
            item.text = None
        if item.tag == "g":
            item.attrib.pop("id", None)  # nothing refers to it
        item.attrib = {name.rpartition("}")[2]: _attribute(name, value, ident) for name, value in item.attrib.items()}
    return h(
        "svg",
        h("title", title, id=f"{ident}-title"),
        h("desc", description, id=f"{ident}-desc"),
        Markup("".join(ET.tostring(child, encoding="unicode") for child in root)),
        xmlns=SVG,
        viewBox=root.attrib["viewBox"],
        role="img",
        class_=f"plot {class_ or ''}".strip(),
        style=f"max-width:{root.attrib['viewBox'].split()[2]}px",
        aria_labelledby=f"{ident}-title {ident}-desc",
    )


def _attribute(name: str, value: str, ident: str) -> str:
    """An attribute with CSS variables for colours, coordinates to a hundredth of a pixel, and ids that are unique."""
    if name == "id":
        return f"{ident}-{value}"
    value = re.sub(r"([:;])?\s+", lambda found: found.group(1) or " ", value.strip())
    value = re.sub("#fe01..", lambda found: f"var(--{_NAMES[found.group()]})", value)
    value = re.sub(r"-?\d+\.\d+", lambda found: f"{round(float(found.group()), 2) + 0.0:g}", value)
    return re.sub(r"url\(#|^#", rf"\g<0>{ident}-", value)


def place_labels(
    axes: Axes,
    labels: Sequence[tuple[float, float, str, str]],
    points: Sequence[tuple[float, float]],
    lines: Sequence[tuple[float, float]] = (),
) -> None:
    """Write (x, y, text, hue) beside their points, without hiding points or other labels and, if possible, lines.

    A label without room is left out: the table and the CSV file have it.
    """
    from matplotlib.transforms import Bbox

    height = 13.0
    where = axes.transData.transform
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in map(where, points)]
    crossed = [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in map(where, lines)]
    frame = axes.get_window_extent()
    for x, y, text, hue in labels:
        text = clean(text)
        cx, cy = where((x, y))
        width = 6.6 * len(text)
        free: list[tuple[bool, int, float, float, str, Bbox]] = []
        for dx, dy, align in _PLACES:
            left = cx + dx - {"left": 0.0, "center": width / 2, "right": width}[align]
            box = Bbox.from_bounds(left, cy + dy - height / 2, width, height)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 4
            if inside and not box.count_overlaps(taken):
                free.append((box.count_overlaps(crossed) > 0, len(free), dx, dy, align, box))
        if not free:
            continue
        _, _, dx, dy, align, box = min(free)
        annotation = axes.annotate(text, (x, y), xytext=(dx, dy), textcoords="offset points", color=colour(hue))
        annotation.set(ha=align, va="center_baseline", fontsize=11)
        taken.append(box)


_PLACES = tuple(
    (dx, dy, align)
    for far in (1.0, 1.7, 2.6, 3.6)
    for dx, dy, align in (
        (0, 15 * far, "center"),
        (0, -15 * far, "center"),
        (10 * far, 10 * far, "left"),
        (10 * far, -10 * far, "left"),
        (-10 * far, 10 * far, "right"),
        (-10 * far, -10 * far, "right"),
        (12 * far, 0, "left"),
        (-12 * far, 0, "right"),
    )
)


def named(look: Look, name: str) -> Markup:
    """A name beside a marker."""
    return h("span", swatch(look), short(name, 60), class_="arm")


def arm_name(view: View, arm: str) -> Markup:
    """An arm's name beside its marker."""
    return named(view.look(arm), arm)


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
    return legend([*((view.look(arm), "best of n" if arm == BEST_OF_N else arm, None) for arm in arms), *more])


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


def mark(
    axes: Axes,
    x: float,
    y: float,
    look: Look,
    across: Ends = None,
    upright: Ends = None,
    *,
    size: float = 6.5,
    filled: bool = True,
) -> None:
    """A point in the colour and with the marker of its arm, above the lines, and its intervals as thin lines behind."""
    hue, page = colour(look.hue), colour("page")
    for ends, xs, ys in ((upright, [x, x], upright), (across, across, [y, y])):
        if ends is not None:
            axes.plot(xs, ys, color=hue, lw=1.1, alpha=0.45, zorder=2, solid_capstyle="butt")
    size *= SIZES.get(look.marker, 1.0)
    face, edge, width = (hue, page, 0.7) if filled else (page, hue, 1.5)
    axes.plot([x], [y], ls="", marker=look.marker, ms=size, mfc=face, mec=edge, mew=width, zorder=4)


def trail(
    axes: Axes, model: str, places: Sequence[tuple[Row | FrontierPoint, float, float]], look: Look
) -> list[tuple[float, float]]:
    """A model's snapshots in order of steps, small and light, on a thin line that ends at the model.

    Args:
        places: (row, x, y) of all models and snapshots. Returns the (x, y) that are joined.
    """
    run = [(one.step, x, y) for one, x, y in places if one.step is not None and one.model.partition("#")[0] == model]
    line = [(x, y) for _, x, y in sorted(run)] + [(x, y) for one, x, y in places if one.model == model]
    if run:
        hue, size = colour(look.hue), 4 * SIZES.get(look.marker, 1.0)
        x, y = zip(*line)
        axes.plot(x, y, color=hue, lw=0.9, alpha=0.4, zorder=1.6)
        axes.plot(x[:-1], y[:-1], ls="", marker=look.marker, ms=size, mfc=hue, mec="none", alpha=0.5, zorder=3)
    return line
