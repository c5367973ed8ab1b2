"""What the arms cost, and what they get for it."""

from __future__ import annotations

from typing import Any

from rlhf_pipeline.report.markup import Column, Group, Markup, h, table
from rlhf_pipeline.report.parts import (
    PANEL,
    Section,
    arm_legend,
    arm_name,
    error_bars,
    mark,
    panels,
    plot,
    section,
    trail,
)
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.svg import colour, draw, dress
from rlhf_pipeline.report.text import clean, count, duration, finite, memory, number, scaled, tick
from rlhf_pipeline.report.view import Reading, View, items, part, setting_csv

BILL = {
    "flops": ("FLOPs", lambda value: scaled(value, "FLOP")),
    "wall_seconds": ("wall time", duration),
    "tokens_trained": ("tokens trained", scaled),
    "tokens_generated": ("tokens generated", scaled),
    "optimizer_steps": ("optimizer steps", count),
    "peak_memory_bytes": ("peak memory", memory),
}
AXES = {"flops": "training FLOPs", "wall_seconds": "wall time, seconds"}


def cost_section(view: View, points: Points) -> Section | None:
    """The bill of each arm, and reward against FLOPs and wall time."""
    return section("cost", "Cost", _bill(view), _panels(view, points))


def _bills(view: View) -> dict[str, dict[str, Any]]:
    """The mean bill of each arm: that of the results, else the mean over its rows."""
    bills: dict[str, dict[str, Any]] = {}
    for arm in view.arms:
        known = dict(items(view.get("arms", arm, "cost")))
        if not known:
            rows = [row for row in view.trained() if view.arm(row) == arm and not view.is_baseline(row)]
            for key in BILL:
                values = [value for row in rows if (value := finite(part(row, "cost", key))) is not None]
                if values:
                    known[key] = sum(values) / len(values)
        if known:
            bills[arm] = known
    return bills


def _bill(view: View) -> Markup | None:
    bills = _bills(view)
    shown = [key for key in BILL if any(finite(bill.get(key)) is not None for bill in bills.values())]
    if not shown:
        return None
    columns = [Column("arm", False), *(Column(BILL[key][0]) for key in shown)]
    lines = [[arm_name(view, arm), *(BILL[key][1](bill.get(key)) for key in shown)] for arm, bill in bills.items()]
    cheapest = _ratio(bills)
    mean = "Means over the seeds of the selected models. " if view.has_seeds() else ""
    caption = (
        f"{cheapest}{mean}The bill of PPO includes its reward model; what the "
        "arms share (SFT, preference pairs) is on no bill. Peak memory is of the largest stage."
    )
    return table(columns, [Group(lines)], label="Cost of each arm", caption=caption)


def _ratio(bills: dict[str, dict[str, Any]]) -> str:
    """Which of two arms trains for fewer FLOPs, in words."""
    flops = {arm: value for arm, bill in bills.items() if (value := finite(bill.get("flops")))}
    if len(flops) != 2:
        return ""
    (cheap, less), (dear, more) = sorted(flops.items(), key=lambda entry: entry[1])
    return f"{clean(dear)} takes {number(more / less, 1)} times the FLOPs of {clean(cheap)}. "


def _panels(view: View, points: Points) -> Markup | None:
    csv, made = [], []
    for key, title in AXES.items():
        found = []
        for row in [*view.trained(), *view.snapshots]:
            spent, reward = finite(part(row, "cost", key)), view.figure(row, view.primary)
            if spent and reward is not None and not view.is_baseline(row):
                found.append((row, spent, reward))
        if len(found) < 2:
            continue
        csv += [
            [
                view.arm(row),
                setting_csv(row.get("setting")),
                row.get("seed"),
                row.get("step"),
                row.get("name"),
                key,
                spent,
                *reward.cells,
            ]
            for row, spent, reward in found
        ]
        made.append(_panel(view, key, title, found))
    if not made:
        return None
    columns = [
        "arm",
        "setting",
        "seed",
        "step",
        "model",
        "cost",
        "spent",
        view.primary,
        f"{view.primary}_low",
        f"{view.primary}_high",
    ]
    file = points.add("cost", columns, csv)
    caption = (
        "Each point is one model: what it got for what its own training and that of its reward model cost. "
        f"{view.basis()}"
    )
    if view.snapshots:
        caption += " Small and light: snapshots, at the bill up to their step, joined run by run."
    return plot(panels(made), caption, [file], arm_legend(view, view.arms))


def _run(found: list[tuple[Any, float, Reading]], end: Any) -> list[tuple[float, float]]:
    """(cost, reward) of the snapshots on the way to a model, in order of steps, and of the model."""
    name = str(end.get("model"))
    steps = [
        (finite(row.get("step")), spent, reward.mean)
        for row, spent, reward in found
        if finite(row.get("step")) is not None and str(row.get("model")).partition("#")[0] == name
    ]
    last = next((spent, reward.mean) for row, spent, reward in found if row is end)
    return [*((spent, reward) for _, spent, reward in sorted(steps)), last]


def _panel(view: View, key: str, title: str, found: list[tuple[Any, float, Reading]]) -> Markup:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    spent = [value for _, value, _ in found]
    wide = max(spent) / min(spent) > 30

    def paint(axes: Any) -> None:
        dress(axes, f"{title}{' (logarithmic)' if wide else ''}", view.name_of())
        for row, cost, reward in found:
            look = view.look_of(row)
            hue = colour(look.hue)
            if finite(row.get("step")) is not None:
                continue
            if len(line := _run(found, row)) > 1:
                trail(axes, line, look)
            error_bars(axes, Reading(cost), reward, hue)
            mark(axes, [cost], [reward.mean], look)
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(0, max(spent) * 1.08)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))

    small = sum(finite(row.get("step")) is not None for row, _, _ in found)
    models = f"{len(found) - small} models{f' and {small} snapshots' if small else ''}"
    ends = f"{models}, from {scaled(min(spent))} to {scaled(max(spent))}."
    return h(
        "div",
        draw(
            f"cost-{key.replace('_', '-')}", f"{view.name_of().capitalize()} against {title}", ends, paint, size=PANEL
        ),
    )
