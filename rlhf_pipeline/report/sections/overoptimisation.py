"""Over-optimisation: proxy and judge against the square root of KL, with the fitted form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.report.charts import LARGE, PANEL, arm_legend, arm_name, panel, panels, plot
from rlhf_pipeline.report.drawing import colour, dress, mark
from rlhf_pipeline.report.markup import Markup, Section, h, join, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.sides import GaoFit, Overoptimised
from rlhf_pipeline.report.style import NEUTRAL
from rlhf_pipeline.report.text import clean, number
from rlhf_pipeline.report.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 80
Pair = tuple[float, float]
Points3 = Sequence[tuple[float, float, float]]


def fitted(fit: GaoFit | None) -> list[Pair]:
    """Gao et al.'s form (2022, eq. 1), d (alpha - beta ln d) with d = sqrt(KL), within the range it was fitted to.

    Outside that range it predicts nothing.
    """
    if fit is None:
        return []
    places = [fit.least + (fit.largest - fit.least) * step / STEPS for step in range(STEPS + 1)]
    return [(d, d * (fit.alpha - fit.beta * math.log(d))) for d in places if d > 0]


def overoptimisation_section(view: View, points: Points) -> Section | None:
    """One panel for each arm: proxy and judge against the square root of KL, with the fitted form."""
    entries = {arm: entry for arm, entry in (view.results.overoptimisation or {}).items() if entry.points}
    if all(len(entry.points) < 2 for entry in entries.values()):
        return None  # one point is not a curve
    found = {arm: sorted(entry.points) for arm, entry in entries.items()}
    curves = {arm: fitted(entry.fit) for arm, entry in entries.items()}
    csv = [[arm, *point] for arm, line in found.items() for point in line]
    files = [points.add("overoptimisation", ["arm", "sqrt_kl", "proxy", "gold"], csv)]
    if lines := [[arm, *pair] for arm, curve in curves.items() for pair in curve]:
        files.append(points.add("overoptimisation_fit", ["arm", "sqrt_kl", "gold"], lines))
    heights = [value for line in found.values() for point in line for value in point[1:]]
    room = 0.08 * (max(heights) - min(heights) or 1.0)
    limits, large = (min([*heights, 0.0]) - room, max(heights) + room), len(entries) < 3
    made = [
        _overoptimisation_panel(view, place, arm, found[arm], curves[arm], _peak(entry), limits, large)
        for place, (arm, entry) in enumerate(entries.items())
    ]
    gold = view.name_of(next(iter(entries.values())).gold)
    key = arm_legend(
        view,
        entries,
        (NEUTRAL, f"filled, solid: {gold} with the fitted form", "line"),
        (NEUTRAL, "hollow, dashed: the reward model's score", "dashed"),
    )
    caption = (
        "Gain over the reference against the square root of KL, one point for each setting"
        f"{' and snapshot' if view.snapshots else ''}, averaged over seeds. "
        "Where the solid line falls while the dashed line rises, more optimisation makes responses worse. The form "
        "(Gao et al. 2022) is fitted to the filled points only and drawn within their range; a dotted vertical line "
        f"marks its peak if over-optimisation was found. {view.basis()}"
    )
    said = h("ul", *(_finding(view, arm, entry) for arm, entry in entries.items()), class_="findings")
    body = plot(panels(made, large=large), caption, files, key)
    return section("overoptimisation", "Over-optimisation", said, body)


def _peak(entry: Overoptimised) -> float | None:
    """The maximum of the form if over-optimisation was found; it can also peak where a reward only levels off."""
    return entry.fit.peak if entry.fit is not None and entry.found else None


def _finding(view: View, arm: str, entry: Overoptimised) -> Markup:
    text, fit, peak = "over-optimisation was not assessed", entry.fit, _peak(entry)
    if entry.found is not None:
        text = "no over-optimisation found"
    if entry.found:
        text = "over-optimised: the gold reward falls while the reward model's score rises"
    if entry.why:
        text += f" ({clean(entry.why)})"
    if fit is not None:
        text += f"; fit d (α − β ln d), α {number(fit.alpha)}, β {number(fit.beta)}"
        text += f", peak at KL {number(peak**2)}" if peak is not None else ""
    return h("li", join([arm_name(view, arm), ": ", text, "."]))


def _overoptimisation_panel(
    view: View, place: int, arm: str, found: Points3, curve: list[Pair], peak: float | None, limits: Pair, large: bool
) -> Markup:
    look = view.look(arm)
    d, proxy, gold = zip(*found)

    def paint(axes: Axes) -> None:
        hue = colour(look.hue)
        dress(axes, "√KL", f"{arm}: gain over the reference")
        axes.axhline(0, color=colour("line"), lw=1.2, zorder=1)
        axes.plot(d, proxy, color=hue, lw=1.3, dashes=(4, 3), alpha=0.8, zorder=2)
        for at, gain in zip(d, proxy):
            mark(axes, at, gain, look, filled=False)
        for at, gain in zip(d, gold):
            mark(axes, at, gain, look, size=7)
        right = max(d) * 1.05 or 1.0
        if curve:
            axes.plot(*zip(*curve), color=hue, lw=2.2, zorder=2.5)
        else:
            axes.plot(d, gold, color=hue, lw=1.6, zorder=2.5)
        if peak is not None:
            axes.axvline(peak, color=colour("muted"), lw=1.2, ls=":", zorder=1)
        axes.set_xlim(-0.02 * right, right)
        axes.set_ylim(*limits)

    gains = f"the reward model's score gains {number(proxy[-1])}, {view.name_of(view.primary)} {number(gold[-1])}"
    title, size = f"Over-optimisation of {arm}", LARGE if large else PANEL
    return panel(f"overoptimisation-{place}", title, f"At the largest KL {gains}.", paint, size)
