"""Exact figures: how near each model comes to the optimum that is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.report.markup import Column, Group, Markup, h, join, table
from rlhf_pipeline.report.palette import NEUTRAL, Look
from rlhf_pipeline.report.parts import PANEL, Section, arm_legend, folded, mark, named, panels, plot, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.svg import draw, dress
from rlhf_pipeline.report.text import clean, count, finite, number, percent, plain
from rlhf_pipeline.report.view import BEST_OF_N, View, part, records

Row = Mapping[str, Any]

PANELS = {
    "share": "share of the attainable objective",
    "gap_true": "β KL(π‖π*): all causes together",
    "gap_learned": "β KL(π‖π*) of the learned reward",
}


def _value(row: Row, name: str) -> float | None:
    if name == "share":
        return finite(row.get(name))
    if name == "gap_learned":  # PPO's distance to what it was trained on, DPO's disagreement with the reward model
        optimisation = finite(part(row, "optimisation_gap", "value"))
        return finite(part(row, "disagreement", "value")) if optimisation is None else optimisation
    return finite(part(row, name, "value"))


def exact_section(view: View, points: Points) -> Section | None:
    """The table of exact figures and their panels against beta."""
    rows = records(view.get("exact", "rows"))
    if not rows:
        return None
    warning = h(
        "p",
        h("b", "These do not add up. "),
        "A distance to the optimum of one reward and a distance to that of another are not parts of a whole: the "
        "part may be larger than the whole, and a difference may be negative.",
        class_="aside",
    )
    table_of_all = _table(view, rows)
    return section("exact", "Exact figures", _panels(view, points, rows), warning, table_of_all, _best_of_n(view))


def _look(view: View, row: Row) -> Look:
    arm = view.arm_of_model(row.get("model"))
    return view.look(arm) if arm is not None and row.get("model") != view.baseline else NEUTRAL


def _panels(view: View, points: Points, rows: list[Row]) -> Markup | None:
    made, csv, arms = [], [], set()
    for name, title in PANELS.items():
        read = [
            (row, finite(row.get("beta")), _value(row, name)) for row in rows if view.arm_of_model(row.get("model"))
        ]
        found = [
            (row, beta, value)
            for row, beta, value in read
            if beta and value is not None and row.get("model") != view.baseline
        ]
        if not found:
            continue
        csv += [[row.get("name"), beta, name, value] for row, beta, value in found]
        arms |= {view.arm_of_model(row.get("model")) for row, _, _ in found}
        made.append(_panel(view, name, title, found))
    if len({entry[0] for entry in csv}) <= len(arms):
        return None  # one model an arm, or none: the table says it all
    file = points.add("exact", ["model", "beta", "figure", "value"], csv)
    caption = (
        f"Exact: over all {count(view.get('exact', 'responses'))} responses to {count(view.get('exact', 'prompts'))} "
        "prompts, so the figures have no sampling error; they vary from training to training only. A share of 100 % is "
        "the optimum, 0 % the reference; a distance of 0 is the optimum. Learned reward: PPO's optimisation error, "
        "DPO's disagreement with the reward model."
    )
    return plot(panels(made), caption, [file], arm_legend(view, [arm for arm in view.arms if arm in arms]))


def _panel(view: View, name: str, title: str, found: list[tuple[Row, float, float]]) -> Markup:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    betas = sorted({beta for _, beta, _ in found})

    def paint(axes: Any) -> None:
        dress(axes, "β", title)
        for row, beta, value in found:
            mark(axes, [beta], [value], _look(view, row))
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
    return h("div", draw(f"exact-{name.replace('_', '-')}", f"{title.capitalize()}, by β", ends, paint, size=PANEL))


def _table(view: View, rows: list[Row]) -> Markup:
    lines = []
    for row in rows:
        lines.append(
            [
                named(_look(view, row), clean(view.title_of_model(row.get("name")))),
                plain(row.get("beta")) if finite(row.get("beta")) is not None else "–",
                *(number(row.get(figure), 3) for figure in ("reward", "kl", "objective")),
                percent(row.get("share")),
                number(part(row, "gap_true", "value"), 4),
                number(_value(row, "gap_learned"), 4),
            ]
        )
    columns = [
        Column("model", False),
        Column("β"),
        Column("reward"),
        Column("KL"),
        Column("objective"),
        Column("share"),
        Column("βKL(π‖π*)"),
        Column("βKL(π‖π*RM)"),
    ]
    learned, few = view.get("exact", "reward_model"), view.get("exact", "reward_model_prompts")
    caption = (
        f"Objective: reward − β KL to {clean(view.get('exact', 'reference') or 'the reference')}. Share: of what an "
        "optimal policy gains over the reference."
    )
    if learned:
        caption += (
            " βKL(π‖π*RM): for PPO to the optimum of the reward it was trained on (its optimisation error), for DPO "
            f"to that of {clean(learned)} (their disagreement){f', over {count(few)} prompts' if few else ''}."
        )
    made = table(columns, [Group(lines)], label="Exact figures", caption=caption)
    return folded(f"Exact figures of every model ({len(lines)})", len(lines), made)


def _best_of_n(view: View) -> Markup | None:
    """Best-of-n of the reference without sampling: its KL is less than the bound where responses repeat."""
    rows = [(n, row) for row in records(view.get("exact", "best_of_n")) if (n := finite(row.get("n")))]
    if not rows:
        return None
    look = view.look(BEST_OF_N)
    lines = []
    for n, row in rows:
        bound = math.log(n) - (n - 1) / n
        name = named(look, f"best of {plain(n)}")
        lines.append([name, number(row.get("reward"), 3), number(row.get("kl"), 3), f"≤ {number(bound, 3)}"])
    columns = [Column("policy", False), Column("reward"), Column("KL"), Column("its bound")]
    caption = (
        f"Exact best of n of the reference, chosen by {clean(rows[0][1].get('chosen_by') or 'the reward model')}, over "
        f"{count(rows[0][1].get('prompts'))} prompts: not those of the sampled figures where these are more."
    )
    made = table(columns, [Group(lines)], label="Exact best of n", caption=caption)
    return join([h("h3", "Best of n, exactly"), made])
