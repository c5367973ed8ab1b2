"""Over-optimisation: the reward that was trained on and the one that counts, against the distance travelled."""

from __future__ import annotations

import math
from typing import Any

from rlhf_pipeline.report.markup import Markup, h, join
from rlhf_pipeline.report.parts import PANEL, Section, arm_legend, arm_name, mark, panels, plot, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.svg import colour, draw, dress
from rlhf_pipeline.report.text import clean, finite, number
from rlhf_pipeline.report.view import View, items, part, tuples

SIZE = (420, 300)
STEPS = 80

Curve = list[tuple[float, float]]


def fitted(fit: Any) -> Curve:
    """Gao et al.'s form (2022, eq. 1) between the distances that it was fitted to; outside it predicts nothing.

    d (alpha - beta ln d) with d = sqrt(KL).
    """
    known = [finite(part(fit, key)) for key in ("alpha", "beta", "least", "largest")]
    if None in known:
        return []
    alpha, beta, left, right = (value for value in known if value is not None)
    places = [left + (right - left) * step / STEPS for step in range(STEPS + 1)]
    return [(d, d * (alpha - beta * math.log(d))) for d in places if d > 0]


def overoptimisation_section(view: View, points: Points) -> Section | None:
    """One panel for each arm: proxy and judge against the square root of KL, with the fitted form."""
    entries = {arm: entry for arm, entry in items(view.get("overoptimisation")) if tuples(part(entry, "points"), 3)}
    if all(len(tuples(part(entry, "points"), 3)) < 2 for entry in entries.values()):
        return None  # one point is no curve
    csv, lines, made, said = [], [], [], []
    heights = [value for entry in entries.values() for point in tuples(part(entry, "points"), 3) for value in point[1:]]
    room = 0.08 * (max(heights) - min(heights) or 1.0)
    limits = (min([*heights, 0.0]) - room, max(heights) + room)
    for arm, entry in entries.items():
        found = sorted(tuples(part(entry, "points"), 3))
        curve = fitted(part(entry, "fit"))
        csv += [[arm, *point] for point in found]
        lines += [[arm, *pair] for pair in curve]
        size = SIZE if len(entries) < 3 else PANEL
        made.append(_panel(view, arm, found, curve, _peak(entry), limits, size))
        said.append(_finding(view, arm, entry))
    files = [points.add("overoptimisation", ["arm", "sqrt_kl", "proxy", "gold"], csv)]
    if lines:
        files.append(points.add("overoptimisation_fit", ["arm", "sqrt_kl", "gold"], lines))
    gold = view.name_of(next((gold for e in entries.values() if isinstance(gold := part(e, "gold"), str)), None))
    key = arm_legend(
        view,
        entries,
        (None, f"filled, solid: {gold} with the fitted form", "line"),
        (None, "hollow, dashed: the reward model's score", "dashed"),
    )
    caption = (
        "Gain over the reference against the square root of KL, one point for each setting"
        f"{' and snapshot' if view.snapshots else ''}, the mean of its seeds. "
        "Where the solid line bends down while the dashed one climbs, more optimisation makes responses worse. The "
        "form (Gao et al. 2022) is fitted to the filled points only and drawn between them; a dotted upright marks its "
        f"peak where over-optimisation was found. {view.basis()}"
    )
    return section(
        "overoptimisation",
        "Over-optimisation",
        h("ul", *said, class_="findings"),
        plot(panels(made, large=len(made) < 3), caption, files, key),
    )


def _peak(entry: Any) -> float | None:
    """Where the form has its maximum, if over-optimisation was found: it can peak where a reward only levels off."""
    return finite(part(entry, "fit", "peak")) if part(entry, "found") is True else None


def _finding(view: View, arm: str, entry: Any) -> Markup:
    fit, peak = part(entry, "fit"), _peak(entry)
    if part(entry, "found") is True:
        text = "over-optimised: what counts falls while the reward model's score rises"
    else:
        assessed = part(entry, "found") is False
        text = "no over-optimisation found" if assessed else "over-optimisation was not assessed"
    if why := part(entry, "why"):
        text += f" ({clean(why)})"
    if fit:
        text += f"; fit d (α − β ln d), α {number(part(fit, 'alpha'))}, β {number(part(fit, 'beta'))}"
        text += f", peak at KL {number(peak**2)}" if peak is not None else ""
    return h("li", join([arm_name(view, arm), ": ", text, "."]))


def _panel(
    view: View,
    arm: str,
    found: Any,
    curve: Curve,
    peak: float | None,
    limits: tuple[float, float],
    size: tuple[int, int],
) -> Markup:
    look = view.look(arm)
    hue = colour(look.hue)
    d, proxy, gold = zip(*found)

    def paint(axes: Any) -> None:
        dress(axes, "√KL", f"{arm}: gain over the reference")
        axes.axhline(0, color=colour("line"), lw=1.2, zorder=1)
        axes.plot(d, proxy, color=hue, lw=1.3, dashes=(4, 3), alpha=0.8, zorder=2)
        mark(axes, d, proxy, look, filled=False)
        mark(axes, d, gold, look, size=7)
        right = max(d) * 1.05 or 1.0
        if curve:
            axes.plot(*zip(*curve), color=hue, lw=2.2, zorder=2.5)
        else:
            axes.plot(d, gold, color=hue, lw=1.6, zorder=2.5)
        if peak is not None:
            axes.axvline(peak, color=colour("muted"), lw=1.2, ls=":", zorder=1)
        axes.set_xlim(-0.02 * right, right)
        axes.set_ylim(*limits)

    ends = f"At the largest KL the reward model's score gains {number(proxy[-1])}, {view.name_of()} {number(gold[-1])}."
    ident = f"overoptimisation-{list(dict(items(view.get('overoptimisation')))).index(arm)}"
    return h("div", draw(ident, f"Over-optimisation of {arm}", ends, paint, size=size))
