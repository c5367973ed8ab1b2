"""The main table: every arm and setting with its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.report.markup import Column, Group, Markup, details, h, join, table
from rlhf_pipeline.report.parts import Section, arm_name, estimate, named, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.sections.contrasts import contrasts_table, win_rates_table
from rlhf_pipeline.report.text import clean, duration, finite, number, percent, plain, plural, scaled
from rlhf_pipeline.report.view import BEST_OF_N, Reading, View, part, reading, setting_text

MAIN = ("true_reward", "judge", "score", "kl")
Row = Mapping[str, Any]


def results_section(view: View, points: Points) -> Section | None:
    """Arms and settings with their figures, and the differences between the arms."""
    contrasts = contrasts_table(view, points)
    return section("results", "Results", _main(view), _every_model(view), contrasts, win_rates_table(view))


def _figures(view: View) -> list[str]:
    return [name for name in dict.fromkeys((view.primary, *MAIN)) if name in view.figures()]


def _columns(view: View, first: str) -> list[Column]:
    names = [f"{view.name_of(name)}{' ★' if name == view.primary else ''}" for name in _figures(view)]
    columns = [Column(first, False), *(Column(name) for name in names)]
    if _has_effective_beta(view):
        columns.insert(1, Column("effective β", hint="kl_coef × calibration slope of the reward model"))
    if _has_wins(view):
        columns.append(Column("win rate", hint=f"against {view.baseline}" if view.baseline else None))
        columns.append(Column("ties"))
    if _has_cost(view):
        columns += [Column("training"), Column("wall time")]
    return columns


def _has_effective_beta(view: View) -> bool:
    return any(reading(row.get("effective_beta")) is not None for row in view.rows)


def _has_wins(view: View) -> bool:
    return any(reading(row.get("win_rate")) is not None for row in view.rows)


def _has_cost(view: View) -> bool:
    return any(finite(part(row, "cost", "flops")) is not None for row in view.rows)


def _kl(view: View, row: Row) -> Markup:
    """A row's KL: measured, or for best-of-n the bound."""
    bound = finite(row.get("kl_bound"))
    if view.figure(row, "kl") is None and bound is not None:
        return h("span", "≤ ", number(bound), class_="bound")
    return estimate(view.figure(row, "kl"))


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _over_seeds(found: list[Reading | None]) -> Markup:
    """The mean over seeds with the smallest and the largest; one seed keeps its own interval."""
    known = [item for item in found if item is not None]
    if len(known) < 2:
        return estimate(known[0] if known else None)
    means = [item.mean for item in known]
    ends = f"({number(min(means))} … {number(max(means))})"
    return join([h("b", number(sum(means) / len(means))), " ", h("span", ends, class_="ci")])


def _cells(view: View, rows: list[Row], summary: Mapping[str, Any] | None = None) -> list[Markup | str]:
    """The cells of a line of the main table: one model, or one setting over its seeds."""
    cells: list[Markup | str] = []
    if _has_effective_beta(view):
        cells.append(_over_seeds([reading(row.get("effective_beta")) for row in rows]))
    for name in _figures(view):
        over_all = reading(part(summary, "metrics", name))
        if over_all is not None:
            cells.append(estimate(over_all))
        elif name == "kl" and len(rows) == 1:
            cells.append(_kl(view, rows[0]))
        else:
            cells.append(_over_seeds([view.figure(row, name) for row in rows]))
    if _has_wins(view):
        cells.append(_over_seeds([reading(row.get("win_rate")) for row in rows]))
        cells.append(percent(_mean([finite(row.get("ties")) for row in rows]), 0))
    if _has_cost(view):
        flops = _mean([finite(part(row, "cost", "flops")) for row in rows])
        cells += [
            scaled(flops, "FLOP"),
            duration(_mean([finite(part(row, "cost", "wall_seconds")) for row in rows])),
        ]
    return cells


def _main(view: View) -> Markup | None:
    if not view.rows:
        return None
    groups = []
    baseline = [row for row in view.trained() if view.is_baseline(row)]
    if baseline:
        groups.append(Group([[named(view.look_of(row), row.get("name")), *_cells(view, [row])] for row in baseline]))
    groups += [group for arm in view.arms if (group := _arm(view, arm)) is not None]
    best = view.best_of_n()
    if best:
        lines = [
            [f"n = {plain(row.get('n'))}" if row.get("n") else row.get("name"), *_cells(view, [row])] for row in best
        ]
        chosen = clean(best[0].get("chosen_by") or "")
        note = f"of {clean(view.baseline or best[0].get('model'))}{f', chosen by {chosen}' if chosen else ''}"
        header = join([named(view.look(BEST_OF_N), "best of n"), " ", h("span", note, class_="note")])
        groups.append(Group(lines, header))
    return table(_columns(view, "arm and setting"), groups, label="Main table", caption=_caption(view))


def _arm(view: View, arm: str) -> Group | None:
    """The lines of one arm: one for each setting."""
    settings = list(view.settings(arm).values())
    if not settings:
        return None
    lines = []
    for rows in settings:
        text = setting_text(rows[0].get("setting")) or clean(rows[0].get("name"))
        chip = h("span", "selected", class_="chip quiet") if view.is_selected(rows[0]) and len(settings) > 1 else None
        lines.append([join([text, " ", chip]), *_cells(view, rows, view.summary(arm, rows[0].get("setting")))])
    if len(settings) == 1:
        lines[0][0] = named(view.look(arm), _single(arm, settings[0]))
        return Group(lines)
    seeds = max(len(rows) for rows in settings)
    note = plural(len(settings), "setting") + (f" × {plural(seeds, 'seed')}" if seeds > 1 else "")
    marked = frozenset(i for i, rows in enumerate(settings) if view.is_selected(rows[0]))
    return Group(lines, join([arm_name(view, arm), " ", h("span", note, class_="note")]), marked)


def _single(arm: str, rows: list[Row]) -> str:
    """The name of an arm's only line."""
    row = rows[0]
    name = arm if len(rows) > 1 else clean(row.get("name"))
    if setting := setting_text(row.get("setting")):
        return f"{name}, {setting}"
    beta = finite(row.get("beta"))
    return name + (f", β {plain(beta)}" if beta is not None else "")


def _caption(view: View) -> str:
    methods = {clean(entry.get("method")) for entry in view.summaries() if entry.get("method")}
    if methods:
        over = "seeds and prompts" if view.has_seeds() else "prompts"
        said = f"Each line: mean over {over} with its 95 % interval ({', '.join(sorted(methods))})."
    else:
        said = "Each line: mean with its 95 % interval."
    said += f" {view.basis()} ★ primary figure."
    if _has_wins(view):
        against = f" against {clean(view.baseline)}" if view.baseline else ""
        spread = ", over seeds with the smallest and the largest in round brackets" if view.has_seeds() else ""
        said += f" Win rate{against}: ties count one half{spread}; beside it their share."
    if any("kl_bound" in row for row in view.rows):
        said += " ≤ marks an upper bound."
    if _has_cost(view):
        said += " Training: the arm's own runs and, for PPO, those of its reward model."
    if passed := view.passed():
        said += f" Final models alone; behind the curves stand snapshots too ({passed})."
    return said


def _every_model(view: View) -> Markup | None:
    """Each model on a line of its own, where the main table puts seeds together."""
    if not view.has_seeds():
        return None
    rows = [row for row in view.trained() if not view.is_baseline(row)]
    lines = [[named(view.look_of(row), view.title(row)), *_cells(view, [row])] for row in rows]
    caption = f"Mean with its interval over prompts. {view.basis()}"
    made = table(_columns(view, "model"), [Group(lines)], label="Every model", caption=caption)
    return details(f"Every model on its own ({len(lines)})", made, class_="unfold")
