"""Exact figures: the distance of each model from the optimum, which is known in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlhf_pipeline.report.charts import arm_legend, named, panel, panels, plot
from rlhf_pipeline.report.drawing import dress, mark
from rlhf_pipeline.report.figures import BEST_OF_N, Exact, ExactRow
from rlhf_pipeline.report.markup import Group, Markup, Section, columns, folded, h, join, section, table
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import clean, count, headed, number, percent, plain, plural
from rlhf_pipeline.report.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "share": "share of the attainable objective",
    "gap_true": "β KL(π‖π*): from all causes",
    "gap_learned": "β KL(π‖π*) of the learned reward",
}
COLUMNS = columns("lrrrrrrr", "model", "β", "reward", "KL", "objective", "share", "βKL(π‖π*)", "βKL(π‖π*RM)")
BEST_OF_N_COLUMNS = columns("lrrr", "policy", "reward", "KL", "bound of KL")


def _learned(row: ExactRow) -> float | None:
    """PPO's distance from the optimum of its training reward, or DPO's disagreement with the reward model."""
    gap = row.optimisation_gap or row.disagreement
    return None if gap is None else gap.value


def _value(row: ExactRow, name: str) -> float | None:
    return {"share": row.share, "gap_true": row.gap_true.value, "gap_learned": _learned(row)}[name]


def exact_section(view: View, points: Points) -> Section | None:
    """The table of exact figures and their panels against beta."""
    exact = view.results.exact
    if exact is None:
        return None
    warning = h(
        "p",
        h("b", "These distances do not add up. "),
        "The distance from the optimum of a learned reward is not a part of the distance from the optimum of the true "
        "reward: it may be larger, and the difference of the two may be negative.",
        class_="aside",
    )
    body = _panels(view, exact, points), warning, _table(view, exact), _best_of_n(view, exact)
    return section("exact", "Exact figures", *body)


def _arm(view: View, row: ExactRow) -> str | None:
    """The arm of a trained model; None for the baseline, the reference and the optimum."""
    found = view.by_model.get(row.model or "")
    return None if found is None or view.is_baseline(found) else found.arm


def _panels(view: View, exact: Exact, points: Points) -> Markup | None:
    made, csv, arms = [], [], set()
    for name, title in PANELS.items():
        found = []
        for row in exact.rows:
            arm, value = _arm(view, row), _value(row, name)
            if arm is not None and value is not None:
                found.append((arm, row.beta, value))
                csv.append([row.name, row.beta, name, value])
                arms.add(arm)
        if found:
            made.append(_panel(view, name, title, found))
    if len({entry[0] for entry in csv}) <= len(arms):
        return None  # at most one model per arm: the table has everything
    file = points.add("exact", ["model", "beta", "figure", "value"], csv)
    caption = (
        f"Exact: over all {count(exact.responses)} responses to {count(exact.prompts)} "
        "prompts, so the figures have no sampling error; they vary only between training runs. A share of 100 % is the "
        "optimum, 0 % the reference; a distance of 0 is the optimum. For the learned reward, the distance is PPO's "
        "optimisation error, or DPO's disagreement with the reward model."
    )
    return plot(panels(made), caption, [file], arm_legend(view, [arm for arm in view.arms if arm in arms]))


def _panel(view: View, name: str, title: str, found: list[tuple[str, float, float]]) -> Markup:
    def paint(axes: Axes) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

        betas = sorted({beta for _, beta, _ in found})
        dress(axes, "β", title)
        for arm, beta, value in found:
            mark(axes, beta, value, view.look(arm))
        if len(betas) > 1:
            axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(betas))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if name == "share":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        else:
            axes.set_ylim(bottom=0)

    values = [value for *_, value in found]
    ends = f"{len(found)} models, from {number(min(values), 3)} to {number(max(values), 3)}."
    return panel(f"exact-{name.replace('_', '-')}", f"{headed(title)}, by β", ends, paint)


def _table(view: View, exact: Exact) -> Markup:
    lines = [
        [
            named(view.look(_arm(view, row) or ""), view.title(row.name)),
            plain(row.beta),
            *(number(value, 3) for value in (row.reward, row.kl, row.objective)),
            percent(row.share),
            number(row.gap_true.value, 4),
            number(_learned(row), 4),
        ]
        for row in exact.rows
    ]
    caption = (
        f"Exact: over all {count(exact.responses)} responses to {plural(exact.prompts, 'prompt')}. "
        f"Objective: reward − β KL to {clean(exact.reference)}. Share: the part of the "
        "optimal policy's gain over the reference that a model reaches."
    )
    if exact.reward_model:
        few = f", over {plural(exact.reward_model_prompts, 'prompt')}" if exact.reward_model_prompts else ""
        caption += (
            " βKL(π‖π*RM): for PPO, the distance from the optimum of the reward it was trained on (optimisation "
            f"error); for DPO, from the optimum of {clean(exact.reward_model)} (their disagreement){few}."
        )
    made = table(COLUMNS, [Group(lines)], label="Exact figures", caption=caption)
    return folded(f"Exact figures of every model ({len(lines)})", len(lines), made)


def _best_of_n(view: View, exact: Exact) -> Markup | None:
    """Best-of-n of the reference without sampling: its KL is less than the bound where responses repeat."""
    if not exact.best_of_n:
        return None
    lines = []
    for row in exact.best_of_n:
        bound = math.log(row.n) - (row.n - 1) / row.n
        name = named(view.look(BEST_OF_N), f"best of {row.n}")
        lines.append([name, number(row.reward, 3), number(row.kl, 3), f"≤ {number(bound, 3)}"])
    first = exact.best_of_n[0]
    caption = (
        f"Exact best of n of the reference, chosen by {clean(first.chosen_by)}, over "
        f"{plural(first.prompts, 'prompt')}; the sampled figures may be taken over more prompts."
    )
    made = table(BEST_OF_N_COLUMNS, [Group(lines)], label="Exact best of n", caption=caption)
    return join([h("h3", "Best of n, exactly"), made])
