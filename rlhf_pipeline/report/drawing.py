"""Figures by matplotlib.

A figure becomes inline SVG with the font of the page, CSS variables as colours, and text as text.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.report.figures import Row
from rlhf_pipeline.report.markup import Markup, h
from rlhf_pipeline.report.sides import FrontierPoint
from rlhf_pipeline.report.style import LIGHT, Look
from rlhf_pipeline.report.text import clean, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

SVG = "http://www.w3.org/2000/svg"
SIZES = {"^": 1.3, "v": 1.3, "P": 1.25, "X": 1.2, "D": 0.92}
"""Markers that look smaller or larger than a circle of their size."""

MARGIN = 3.0
"""Pixels between the labels of a figure and its edge."""

Ends = tuple[float, float] | None
Paint = Callable[["Axes"], None]

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
    """One figure of width x height CSS pixels; `ident` is unique in the page: all ids of the figure begin with it."""
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
        paint(axes)
        fit(axes)
        return _inline(figure, ident, title, description, class_)


def fit(axes: Axes) -> None:
    """Let the only axes of a figure fill it with their title and labels, up to a margin of 3 pixels.

    Measuring all labels is most of the work of drawing. matplotlib's layouts do it four times for each figure, this
    once, and again only if the axes have other ticks in their new size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = axes.get_figure(root=True)
    assert figure is not None and isinstance(figure.canvas, FigureCanvasAgg)  # `draw` made both
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.width, figure.bbox.height
    for _ in range(3):
        ticks = [tick.tolist() for tick in (axes.get_xticks(), axes.get_yticks())]
        inner, outer = axes.bbox, axes.get_tightbbox(renderer, for_layout_only=True)
        assert outer is not None  # only invisible axes have no box
        left, below = MARGIN + inner.x0 - outer.x0, MARGIN + inner.y0 - outer.y0
        right, top = width - MARGIN - (outer.x1 - inner.x1), height - MARGIN - (outer.y1 - inner.y1)
        axes.set_position((left / width, below / height, (right - left) / width, (top - below) / height))
        if ticks == [tick.tolist() for tick in (axes.get_xticks(), axes.get_yticks())]:
            return


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

    Everything else must be drawn before: this fixes the layout. A label without room is left out: the table and the
    CSV file have it.
    """
    from matplotlib.transforms import Bbox

    fit(axes)
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
    if upright is not None:
        axes.plot([x, x], upright, color=hue, lw=1.1, alpha=0.45, zorder=2, solid_capstyle="butt")
    if across is not None:
        axes.plot(across, [y, y], color=hue, lw=1.1, alpha=0.45, zorder=2, solid_capstyle="butt")
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
