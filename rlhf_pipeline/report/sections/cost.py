"""The cost of each arm, and reward against cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlhf_pipeline.report.charts import arm_legend, arm_name, panel, panels, plot
from rlhf_pipeline.report.drawing import dress, mark, trail
from rlhf_pipeline.report.figures import Cost, Interval, Row
from rlhf_pipeline.report.markup import Group, Markup, Section, columns, section, table
from rlhf_pipeline.report.points import Points, cells
from rlhf_pipeline.report.text import clean, count, duration, headed, memory, number, scaled, tick
from rlhf_pipeline.report.view import View, setting_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BILL: dict[str, tuple[str, Callable[[float], str]]] = {
    "flops": ("FLOPs", lambda value: scaled(value, "FLOP")),
    "wall_seconds": ("wall time", duration),
    "tokens_trained": ("tokens trained", scaled),
    "tokens_generated": ("tokens generated", scaled),
    "optimizer_steps": ("optimizer steps", count),
    "peak_memory_bytes": ("peak memory", memory),
}
AXES = {"flops": "training FLOPs", "wall_seconds": "wall time, seconds"}

Spent = tuple[Row, float, Interval]
"""A model, its cost, and its primary figure."""


def cost_section(view: View, points: Points) -> Section | None:
    """The cost of each arm, and reward against FLOPs and wall time."""
    return section("cost", "Cost", _bill(view), _panels(view, points))


def _mean_bill(view: View, arm: str) -> Cost | None:
    """The mean cost of an arm: the one in the results, else the mean over its rows."""
    entry = view.results.arms.get(arm)
    if entry is not None and entry.cost is not None:
        return entry.cost
    known = [row.cost for row in view.models(arm) if row.cost is not None]
    if not known:
        return None
    return Cost(**{key: sum(getattr(cost, key) for cost in known) / len(known) for key in BILL})


def _bill(view: View) -> Markup | None:
    bills = {arm: bill for arm in view.arms if (bill := _mean_bill(view, arm)) is not None}
    if not bills:
        return None
    heads = columns("l" + "r" * len(BILL), "arm", *(name for name, _ in BILL.values()))
    lines = [
        [arm_name(view, arm), *(text(getattr(bill, key)) for key, (_, text) in BILL.items())]
        for arm, bill in bills.items()
    ]
    mean = "Means over the seeds of the selected models. " if view.has_seeds() else ""
    caption = (
        f"{_ratio(bills)}{mean}The cost of PPO includes its reward model; stages that "
        "the arms share (SFT, preference pairs) are not counted. Peak memory is that of the largest stage."
    )
    return table(heads, [Group(lines)], label="Cost of each arm", caption=caption)


def _ratio(bills: dict[str, Cost]) -> str:
    """A sentence that compares the FLOPs of two arms."""
    flops = sorted((bill.flops, arm) for arm, bill in bills.items() if bill.flops)
    if len(flops) != 2:
        return ""
    (less, cheap), (more, dear) = flops
    return f"{clean(dear)} uses {number(more / less, 1)} times the FLOPs of {clean(cheap)}. "


def _panels(view: View, points: Points) -> Markup | None:
    csv, made = [], []
    for key, title in AXES.items():
        found: list[Spent] = []
        for row in [*view.models(), *view.snapshots]:
            spent, reward = getattr(row.cost, key, 0.0), row.metrics.get(view.primary)
            if spent and reward is not None:
                found.append((row, spent, reward))
        if len(found) < 2:
            continue
        for row, spent, reward in found:
            place = [view.arm(row), setting_csv(row.setting), row.seed, row.step, row.name]
            csv.append([*place, key, spent, *cells(reward)])
        made.append(_panel(view, key, title, found))
    if not made:
        return None
    figure = view.primary
    names = ["arm", "setting", "seed", "step", "model", "cost", "spent", figure, f"{figure}_low", f"{figure}_high"]
    file = points.add("cost", names, csv)
    caption = (
        "Each point is one model. Its cost is that of its own training and of the training of its reward model. "
        f"{view.basis()}"
    )
    if view.snapshots:
        caption += " Small light points are snapshots, with the cost up to their step; a line joins those of one run."
    return plot(panels(made), caption, [file], arm_legend(view, view.arms))


def _panel(view: View, key: str, title: str, found: list[Spent]) -> Markup:
    spent = [value for _, value, _ in found]
    wide = max(spent) / min(spent) > 30
    finals = [one for one in found if one[0].step is None]
    places = [(row, cost, reward.mean) for row, cost, reward in found]

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        dress(axes, f"{title}{' (logarithmic)' if wide else ''}", view.name_of(view.primary))
        for row, cost, reward in finals:
            look = view.look_of(row)
            trail(axes, row.model, places, look)
            mark(axes, cost, reward.mean, look, upright=reward.ends)
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(0, max(spent) * 1.08)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))

    small = len(found) - len(finals)
    models = f"{len(finals)} models{f' and {small} snapshots' if small else ''}"
    ends = f"{models}, from {scaled(min(spent))} to {scaled(max(spent))}."
    heading = f"{headed(view.name_of(view.primary))} against {title}"
    return panel(f"cost-{key.replace('_', '-')}", heading, ends, paint)
