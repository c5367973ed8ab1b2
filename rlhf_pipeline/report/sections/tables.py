"""Tables of figures: every arm and setting, the differences between the arms, win rates, and a ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlhf_pipeline.report.charts import arm_name, interval_bar, named, span
from rlhf_pipeline.report.figures import BEST_OF_N, EffectiveBeta, Interval, Row
from rlhf_pipeline.report.markup import (
    Column,
    Group,
    Markup,
    Section,
    columns,
    details,
    estimate,
    h,
    join,
    linked,
    section,
    table,
)
from rlhf_pipeline.report.points import Points, cells
from rlhf_pipeline.report.sides import Contrast
from rlhf_pipeline.report.text import (
    NOTHING,
    clean,
    count,
    duration,
    number,
    percent,
    plain,
    plural,
    probability,
    scaled,
)
from rlhf_pipeline.report.view import View, setting_text

MAIN = ("true_reward", "judge", "score", "kl")
CONTRASTS = columns("lllrlrr", "contrast", "figure", "where", "difference", "95 % interval", "p", "p (Holm)")
WIN_RATES = columns("llrrlr", "pair", "by", "win rate", "ties", "from 0 to 1", "at equal length")
RANKING = columns("rlrlr", "place", "model", "Elo", "95 % interval", "ties")

FEW = 12
"""If there are more contrasts, only those in the primary figure and the judge's score are shown unfolded."""

MANY = 20
"""In a ranking with more entries, only the best snapshot of each arm is shown."""

BOUNDS = {"at least": "≥ ", "at most": "≤ "}

Summarised = Mapping[str, Interval]
Cell = Callable[[list[Row], Summarised], Markup | str]
"""Makes a cell of the main table from the rows of one setting and its summary over seeds."""


def results_section(view: View, points: Points) -> Section | None:
    """Arms and settings with their figures, and the differences between the arms."""
    return section("results", "Results", _main(view), _every_model(view), _contrasts(view, points), _win_rates(view))


def _over_seeds(found: Sequence[Interval | EffectiveBeta | None]) -> Markup:
    """The mean over seeds with the smallest and the largest value; with one seed, its own interval."""
    means = [item.mean for item in found if item is not None and item.mean is not None]
    if len(means) < 2:
        return estimate(next((item for item in found if item is not None), None))
    ends = f"({number(min(means))} … {number(max(means))})"
    return join([h("b", number(sum(means) / len(means))), " ", h("span", ends, class_="ci")])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figure(name: str) -> Cell:
    def cell(rows: list[Row], summarised: Summarised) -> Markup:
        if name in summarised:
            return estimate(summarised[name])
        bound = rows[0].kl_bound
        if name == "kl" and bound is not None:  # the KL of best-of-n is not measured
            return h("span", "≤ ", number(bound), class_="bound")
        return _over_seeds([row.metrics.get(name) for row in rows])

    return cell


def _columns(view: View) -> list[tuple[Column, Cell]]:
    """The columns of the main table for which any row has a value."""
    made: list[tuple[Column, Cell]] = []
    if any(row.effective_beta is not None and row.effective_beta.mean is not None for row in view.rows):
        column = Column("effective β", hint="kl_coef × calibration slope of the reward model")
        made.append((column, lambda rows, _: _over_seeds([row.effective_beta for row in rows])))
    present = view.figures()
    for name in dict.fromkeys((view.primary, *MAIN)):
        if name in present:
            made.append((Column(f"{view.name_of(name)}{' ★' if name == view.primary else ''}"), _figure(name)))
    if _has_wins(view):
        column = Column("win rate", hint=f"against {view.results.baseline}")
        made.append((column, lambda rows, _: _over_seeds([row.win_rate for row in rows])))
        made.append((Column("ties"), lambda rows, _: percent(_mean([row.ties for row in rows]), 0)))
    if _has_cost(view):

        def bills(rows: list[Row], key: str) -> float | None:
            return _mean([getattr(row.cost, key) for row in rows if row.cost is not None])

        made.append((Column("FLOPs"), lambda rows, _: scaled(bills(rows, "flops"), "FLOP")))
        made.append((Column("wall time"), lambda rows, _: duration(bills(rows, "wall_seconds"))))
    return made


def _has_wins(view: View) -> bool:
    return any(row.win_rate is not None for row in view.rows)


def _has_cost(view: View) -> bool:
    return any(row.cost is not None for row in view.rows)


def _main(view: View) -> Markup:
    made = _columns(view)

    def line(name: object, rows: list[Row], summarised: Summarised) -> list[object]:
        return [name, *(cell(rows, summarised) for _, cell in made)]

    groups = []
    if baseline := view.baseline():
        groups.append(Group([line(named(view.look_of(row), row.name), [row], {}) for row in baseline]))
    groups += [_arm(view, arm, settings, line) for arm in view.arms if (settings := view.settings(arm))]
    if best := view.best_of_n:
        chosen = f", chosen by {clean(best[0].chosen_by)}" if best[0].chosen_by else ""
        note = h("span", f"of {clean(view.results.baseline)}{chosen}", class_="note")
        header = join([named(view.look(BEST_OF_N), "best of n"), " ", note])
        groups.append(Group([line(f"n = {row.n}", [row], {}) for row in best], header))
    heads = [Column("arm and setting", False), *(column for column, _ in made)]
    return table(heads, groups, label="Main table", caption=_caption(view))


def _arm(
    view: View, arm: str, settings: list[list[Row]], line: Callable[[object, list[Row], Summarised], list[object]]
) -> Group:
    lines = []
    for rows in settings:
        text = setting_text(rows[0].setting) or clean(rows[0].name)
        chip = h("span", "selected", class_="chip quiet") if view.is_selected(rows[0]) and len(settings) > 1 else None
        summary = view.summary(arm, rows[0].setting)
        lines.append(line(join([text, " ", chip]), rows, {} if summary is None else summary.metrics))
    if len(settings) == 1:
        lines[0][0] = named(view.look(arm), _single(arm, settings[0]))
        return Group(lines)
    seeds = max(len(rows) for rows in settings)
    note = plural(len(settings), "setting") + (f" × {plural(seeds, 'seed')}" if seeds > 1 else "")
    marked = frozenset(i for i, rows in enumerate(settings) if view.is_selected(rows[0]))
    return Group(lines, join([arm_name(view, arm), " ", h("span", note, class_="note")]), marked)


def _single(arm: str, rows: list[Row]) -> str:
    row = rows[0]
    name = arm if len(rows) > 1 else clean(row.name)
    beta = "" if row.beta is None else f"β {plain(row.beta)}"
    return ", ".join(filter(None, [name, setting_text(row.setting) or beta]))


def _caption(view: View) -> str:
    over = "seeds and prompts" if view.has_seeds() else "prompts"
    methods = ", ".join(sorted({clean(entry.method) for entry in view.results.summary}))
    said = f"Each line: mean over {over} with its 95 % interval ({methods}). {view.basis()}"
    if view.primary:
        said += " ★ marks the primary figure, the one in the headline of the verdict."
    if _has_wins(view):
        spread = "; round brackets hold the smallest and the largest over seeds" if view.has_seeds() else ""
        said += (
            f" Win rate against {clean(view.results.baseline)}: a tie counts one half{spread}. The next column has the "
            "share of ties."
        )
    if view.best_of_n:
        said += " ≤ marks an upper bound."
    if _has_cost(view):
        said += " FLOPs and wall time: training of the model and, for PPO, of its reward model."
    if passed := view.passed():
        said += f" The table shows final models only; the curves also use snapshots ({passed})."
    return said


def _every_model(view: View) -> Markup | None:
    """Each model on its own line, if the main table combines seeds."""
    if not view.has_seeds():
        return None
    made = _columns(view)
    lines = [
        [named(view.look_of(row), view.title(row.model)), *(cell([row], {}) for _, cell in made)]
        for row in view.models()
    ]
    heads = [Column("model", False), *(column for column, _ in made)]
    caption = f"Mean with its interval over prompts. {view.basis()}"
    body = table(heads, [Group(lines)], label="Every model", caption=caption)
    return details(f"Every model on its own ({len(lines)})", body, class_="unfold")


def _or_why(found: Interval | None, why_not: str | None) -> Markup:
    """An estimate, or why there is none."""
    return h("span", why_not or NOTHING, class_="why") if found is None else estimate(found)


def _contrasts(view: View, points: Points) -> Markup | None:
    found = sorted(view.results.contrasts, key=lambda entry: not entry.primary)
    if not found:
        return None
    names = ("name", "a", "b", "figure", "at")
    file = points.add(
        "contrasts",
        [*names, "mean", "low", "high", "p", "p_holm", "primary"],
        [
            [*(getattr(one, name) for name in names), *cells(one.estimate), one.p, one.p_holm, int(one.primary)]
            for one in found
        ],
    )
    first = [one for one in found if len(found) <= FEW or one.figure in (view.primary, "judge")]
    rest = [one for one in found if len(found) > FEW and one.figure not in (view.primary, "judge")]
    methods = sorted({one.estimate.method for one in found if one.estimate is not None})
    how = f" ({', '.join(methods)})" if methods else ""
    caption = linked(
        f"Each line is the first arm minus the second, with the 95 % interval{how}. Lines of the same figure share one "
        "scale. The vertical line marks zero; the colour is that of the arm with the larger value. If an interval "
        "contains zero, the arms cannot be told apart. The primary contrast was declared in advance; p (Holm) is "
        "corrected for the number of the other contrasts.",
        [file],
    )
    more = None
    if rest:
        made = table(CONTRASTS, [_differences(view, rest)], label="Contrasts in other figures")
        more = details(f"Contrasts in other figures ({len(rest)})", made, class_="unfold")
    made = table(CONTRASTS, [_differences(view, first)], label="Contrasts", caption=caption)
    return join([h("h3", "Differences between the arms"), made, more])


def _differences(view: View, found: list[Contrast]) -> Group:
    lines = []
    for one in found:
        scale = span([other.estimate for other in found if other.figure == one.figure], 0)
        ahead = one.a if one.estimate is None or one.estimate.mean >= 0 else one.b
        chip = h("span", "primary", class_="chip quiet") if one.primary else None
        lines.append(
            [
                join([clean(one.name).replace(" - ", " − "), " ", chip]),
                h("span", view.name_of(one.figure), class_="tight"),
                h("span", one.at, class_="where"),
                _or_why(one.estimate, one.why_not),
                interval_bar(one.estimate, *scale, view.look(ahead), 0.0),
                probability(one.p),
                probability(one.p_holm),
            ]
        )
    return Group(lines, marked=frozenset(i for i, one in enumerate(found) if one.primary))


def _win_rates(view: View) -> Markup | None:
    lines = [
        [
            f"{clean(one.a)} against {clean(one.b)}",
            view.name_of(one.figure),
            _or_why(one.estimate, one.why_not),
            percent(one.ties, 0),
            interval_bar(one.estimate, 0.0, 1.0, view.look(one.a), 0.5),
            _or_why(one.length_controlled.estimate, one.length_controlled.why_not),
        ]
        for one in view.results.win_rates
    ]
    lines += [
        [
            f"{clean(one.a)} against {clean(one.b)}",
            "people",
            _or_why(one.estimate, one.why_not),
            percent(one.ties, 0),
            interval_bar(one.estimate, 0.0, 1.0, view.look_of(view.by_model.get(one.a)), 0.5),
            NOTHING,
        ]
        for one in (view.results.human.pairs if view.results.human is not None else ())
    ]
    if not lines:
        return None
    caption = (
        "How often a response scores higher than an independent response of the other model to the same prompt, with "
        "the 95 % interval; a tie counts one half. The vertical line marks one half. At equal "
        "length: the win rate that a logistic model predicts for responses of equal length; it is an association, not "
        "a cause."
    )
    if view.results.human is not None:
        caption += " By people: see the section on their judgement."
    return join([h("h3", "Win rates"), table(WIN_RATES, [Group(lines)], label="Win rates", caption=caption)])


def ranking_section(view: View, points: Points) -> Section | None:
    """Elo with intervals, best first."""
    ranking = view.results.ranking
    found = [(one, one.elo) for one in (ranking.rows if ranking is not None else ()) if one.elo is not None]
    if ranking is None or not found:
        return None
    names = ["name", "elo", "low", "high", "bound", "ties"]
    file = points.add("ranking", names, [[one.name, *cells(elo), one.bound, one.ties] for one, elo in found])
    passed = [one for one, _ in reversed(found) if one.step is not None]
    best = {one.arm: one.name for one in passed}  # the last of an arm: its best
    hidden = {one.name for one in passed if len(found) > MANY and one.name not in best.values()}
    scale = span(elo for _, elo in found)
    lines = []
    for place, (one, elo) in enumerate(found, 1):
        look = view.look_of(view.by_model.get(one.name))
        if one.name not in hidden:
            lines.append(
                [
                    count(place),
                    named(look, view.title(one.name)),
                    join([BOUNDS[one.bound] if one.bound else None, estimate(elo, 0)]),
                    interval_bar(elo, *scale, look),
                    percent(one.ties, 0),
                ]
            )
    text = (
        "Bradley-Terry strengths from responses to the same prompts, on the Elo scale: a lead of 100 points is a win "
        "rate of 64 %, a lead of 200 points 76 %. The baseline is fixed at 1,000. Models whose intervals overlap "
        "widely cannot be told apart. A tie counts as half a win for both, which moves models together; the last "
        "column has each model's share of ties."
    )
    if ranking.separable:
        text += (
            " ≥ and ≤: some models never lost to the others, so their most likely Elo is not finite; the figure is "
            "the known end of the 95 % interval for this number of prompts."
        )
    if hidden:
        text += " Only the best snapshot of each arm is shown (chosen on these prompts, so its Elo is biased upwards)"
        text += f"; {count(len(hidden))} more are in the CSV."
    if ranking.left_out:
        text += f" {count(ranking.left_out)} more models were left out."
    return section("ranking", "Ranking", table(RANKING, [Group(lines)], label="Ranking", caption=linked(text, [file])))
