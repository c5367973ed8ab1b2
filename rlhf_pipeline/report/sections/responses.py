"""Accuracy on held-out pairs, length and diversity of responses, and samples to read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rlhf_pipeline.report.charts import (
    Entry,
    arm_legend,
    arm_name,
    interval_bar,
    legend,
    named,
    panel,
    panels,
    plot,
    span,
)
from rlhf_pipeline.report.drawing import Ends, colour, dress, mark
from rlhf_pipeline.report.figures import Row
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
    section,
    table,
)
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.results import Preferences, Response, Shown
from rlhf_pipeline.report.style import NEUTRAL
from rlhf_pipeline.report.text import clean, count, headed, interval_text, number, percent, plural, probability
from rlhf_pipeline.report.view import View, setting_csv, setting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RELIABILITY = (420, 360)
SCORERS = (
    *columns("lrl", "scorer", "accuracy", "95 % interval"),
    Column("ECE", hint="expected calibration error: 0 is best"),
    Column("NLL", hint="log loss; a coin has 0.693"),
    Column("Brier", hint="squared error of the probability; a coin has 0.25"),
)
FIGURES: dict[str, tuple[str, str, Callable[[float | None], str]]] = {
    "length": ("length, tokens", "length", number),
    "ended": ("share ended by EOS", "ended by EOS", percent),
    "well_formed": ("share well formed", "well formed", percent),
    "entropy": ("entropy, nats per response", "entropy", number),
    "distinct_1": ("distinct-1", "distinct-1", partial(number, digits=3)),
    "distinct_2": ("distinct-2", "distinct-2", partial(number, digits=3)),
    "distinct_4": ("distinct-4", "distinct-4", partial(number, digits=3)),
    "self_bleu": ("self-BLEU", "self-BLEU", partial(number, digits=3)),
}
"""Title of the panel, title of the column, and format of every figure of the responses."""

LONG = 600
"""A longer response, in characters, is shown folded."""

AT_ONCE = 4
"""Models that are shown side by side; the others are folded."""

Bins = list[tuple[float, float, int]]


def preferences_section(view: View, points: Points) -> Section | None:
    """Accuracy and calibration of the reward model and of DPO's implicit reward on held-out pairs."""
    preferences = view.results.preferences
    if preferences is None:
        return None
    basis = f"{count(preferences.pairs)} held-out pairs of {count(preferences.prompts)} prompts"
    scale = span([entry.accuracy for entry in preferences.scorers.values()], 0.5)
    lines = []
    for name, entry in preferences.scorers.items():
        look = view.look(view.kind(name))
        bar = interval_bar(entry.accuracy, *scale, look, 0.5)
        figures = [number(value, 3) for value in (entry.ece, entry.nll, entry.brier)]
        lines.append([named(look, view.title(name)), estimate(entry.accuracy, 3), bar, *figures])
    caption = (
        f"{basis}; accuracy counts a tie as one half; the interval is clustered by prompt; the vertical line is chance."
    )
    made = table(SCORERS, [Group(lines)], label="Accuracy and calibration", caption=caption)
    title = "Accuracy on held-out pairs: reward model and DPO"
    return section("preferences", title, made, _test(preferences), _reliability(view, preferences, points, basis))


def _test(preferences: Preferences) -> Markup | None:
    test = preferences.test
    if test is None:
        return None
    said = "the interval excludes zero" if test.difference.excludes() else "the interval contains zero"
    text = f"{clean(test.name)}: {interval_text(test.difference, 3)}, p {probability(test.p)}"
    return h("p", f"{text} ({clean(test.method)}); {said}.")


def _reliability(view: View, preferences: Preferences, points: Points, basis: str) -> Markup | None:
    bins = {name: entry.bins for name, entry in preferences.scorers.items() if entry.bins}
    if not bins:
        return None
    rows = [[name, *row] for name, found in bins.items() for row in found]
    file = points.add("calibration", ["scorer", "confidence", "accuracy", "pairs"], rows)
    kinds = dict.fromkeys(view.kind(name) for name in bins)
    names = {kind: f"{kind}, implicit reward" if kind in view.arms else kind for kind in kinds}
    low = min([0.5, *(value for found in bins.values() for row in found for value in row[:2])])
    made = []
    for index, kind in enumerate(kinds):
        ours = {name: found for name, found in bins.items() if view.kind(name) == kind}
        made.append(_reliability_panel(view, f"reliability-{index}", names[kind], ours, low))
    key = legend([*((view.look(kind), names[kind], None) for kind in kinds), (NEUTRAL, "calibrated", "dashed")])
    caption = (
        f"{basis}, in bins of equal size by confidence; larger markers hold more pairs; each model has one line. On "
        "the dashed line accuracy equals confidence; below it a scorer is overconfident, above it underconfident."
    )
    return plot(panels(made, large=True), caption, [file], key)


def _reliability_panel(view: View, ident: str, name: str, bins: dict[str, Bins], low: float) -> Markup:
    most = max(size for found in bins.values() for *_, size in found)

    def paint(axes: Axes) -> None:
        dress(axes, "confidence: predicted probability", f"{name}: share of pairs ordered correctly")
        axes.plot([low, 1], [low, 1], color=colour("muted"), lw=1.2, dashes=(4, 3), zorder=1)
        for label, found in bins.items():
            look = view.look(view.kind(label))
            x, y, _ = zip(*found)
            axes.plot(x, y, color=colour(look.hue), lw=1.5, alpha=0.7, zorder=2)
            for at, right, size in found:
                mark(axes, at, right, look, size=4 + 3 * size / most)
        room = 0.03 * (1 - low)
        axes.set_xlim(low - room, 1 + room)
        axes.set_ylim(low - room, 1 + room)

    ends = "; ".join(
        f"{clean(label)}: {len(found)} bins, the last with confidence {number(found[-1][0])} and accuracy "
        f"{number(found[-1][1])}"
        for label, found in bins.items()
    )
    return panel(ident, f"Reliability of {name}", f"{ends}.", paint, RELIABILITY)


def _value(row: Row, name: str) -> tuple[float, Ends] | None:
    """A figure of a row's responses with its interval; diversity has none."""
    if (found := row.metrics.get(name)) is not None:
        return found.mean, found.ends
    value = getattr(row.diversity, name, None)
    return None if value is None else (value, None)


def responses_section(view: View, points: Points) -> Section | None:
    """Panels of length, endings, entropy and diversity against KL, and their table."""
    present = [name for name in FIGURES if any(_value(row, name) for row in view.rows)]
    if not present:
        return None
    body = _response_panels(view, points, present), _responses_table(view, present)
    return section("responses", "Length and diversity", *body)


def _response_panels(view: View, points: Points, present: list[str]) -> Markup | None:
    csv: list[list[object]] = []
    made = []
    for place, name in enumerate(present):
        found = []
        for row in view.trained:
            value = _value(row, name)
            if value is not None and "kl" in row.metrics:
                found.append((row, row.metrics["kl"].mean, *value))
        if len(found) < 2:
            continue
        for row, kl, mean, ends in found:
            place_of = [view.arm(row), setting_csv(row.setting), row.seed, row.name]
            csv.append([*place_of, name, kl, mean, *(ends or (None, None))])
        made.append(_response_panel(view, f"responses-{place}", FIGURES[name][0], found))
    if not made:
        return None
    file = points.add("responses", ["arm", "setting", "seed", "model", "figure", "kl", "value", "low", "high"], csv)
    more: list[Entry] = [(NEUTRAL, clean(row.name), None) for row in view.baseline()[:1]]
    caption = f"Each point is one model at its KL to the reference. {view.basis()}"
    return plot(panels(made), caption, [file], arm_legend(view, view.arms, *more))


def _response_panel(view: View, ident: str, title: str, found: list[tuple[Row, float, float, Ends]]) -> Markup:
    def paint(axes: Axes) -> None:
        dress(axes, "KL to the reference", title)
        for arm in view.arms:
            line = sorted((kl, mean) for row, kl, mean, _ in found if view.arm(row) == arm)
            if len(line) > 1:
                axes.plot(*zip(*line), color=colour(view.look(arm).hue), lw=1.2, alpha=0.4, zorder=1)
        for row, kl, mean, ends in found:
            mark(axes, kl, mean, view.look_of(row), upright=ends)

    values = [mean for _, _, mean, _ in found]
    description = f"{len(found)} models, from {number(min(values), 3)} to {number(max(values), 3)}."
    return panel(ident, f"{headed(title)} against KL", description, paint)


def _responses_table(view: View, present: list[str]) -> Markup:
    """Means over the seeds of each setting."""

    def line(name: Markup, rows: list[Row]) -> list[object]:
        cells: list[object] = [name]
        for figure in present:
            known = [value[0] for row in rows if (value := _value(row, figure)) is not None]
            cells.append(FIGURES[figure][2](sum(known) / len(known) if known else None))
        return cells

    groups = [Group([line(named(NEUTRAL, row.name), [row]) for row in view.baseline()])]
    for arm in view.arms:
        settings = view.settings(arm)
        lines = [line(join([arm_name(view, arm), " ", setting_text(rows[0].setting)]), rows) for rows in settings]
        groups.append(Group(lines))
    groups.append(Group([line(named(view.look_of(row), f"best of {row.n}"), [row]) for row in view.best_of_n]))
    heads = columns("l" + "r" * len(present), "model", *(FIGURES[name][1] for name in present))
    tokens = [row.diversity.tokens for row in view.rows if row.diversity is not None]
    caption = "Means over the seeds of a setting. " if view.has_seeds() else ""
    caption += f"Distinct-n and self-BLEU over {count(max(tokens))} tokens of each model." if tokens else view.basis()
    return table(heads, [group for group in groups if group.rows], label="Length and diversity", caption=caption)


def samples_section(view: View, points: Points) -> Section | None:
    """Responses of all models to the same prompts. Model output is untrusted: it is written as plain text only."""
    if not view.results.samples_shown:
        return None
    intro = h("p", "All models answer the same prompts; the scores of a response are shown below it.")
    made = [_prompt(view, shown) for shown in view.results.samples_shown]
    return section("samples", "Samples, side by side", intro, *made)


def _prompt(view: View, shown: Shown) -> Markup:
    first = _shown_first(view, list(shown.responses))
    cards = {name: _card(view, name, found) for name, found in shown.responses.items()}
    rest = [card for name, card in cards.items() if name not in first]
    more = details(f"{plural(len(rest), 'other model')}", h("div", *rest, class_="cards")) if rest else None
    quoted = h("h3", _text(shown.prompt or "(empty prompt)"), class_="prompt")
    return h("article", quoted, h("div", *(cards[name] for name in first), class_="cards"), more, class_="sample")


def _shown_first(view: View, names: list[str]) -> list[str]:
    """The baseline and one model of each arm, at the selected setting if there is one; all models if they are few."""
    if len(names) <= AT_ONCE:
        return names
    first = [row.name for row in view.baseline() if row.name in names][:1]
    for arm in view.arms:
        ours = [row for row in view.models(arm) if row.name in names]
        ours.sort(key=lambda row: not view.is_selected(row))  # stable: the first seed of the selected setting
        first += [row.name for row in ours[:1]]
    first += [name for name in names if name not in first][: max(0, 2 - len(first))]
    return first[:AT_ONCE]


def _card(view: View, name: str, found: list[Response]) -> Markup:
    look = view.look_of(view.by_model.get(name))
    style = f"border-top-color:{look.css}"
    heading = h("h4", named(look, view.title(name)))
    return h("div", heading, *(_response(view, item) for item in found), class_="card", style=style)


def _response(view: View, response: Response) -> Markup:
    text = clean(response.text)
    cut = h("span", "cut", class_="chip quiet", title="cut at the maximum response length, without an end token")
    known = {"true_reward": response.true_reward, "judge": response.judge, "score": response.score}
    scores = [
        h("span", f"{view.name_of(name)} ", h("b", number(value))) for name, value in known.items() if value is not None
    ]
    body = h("p", _text(text), class_="said") if text.strip() else h("p", "(nothing)", class_="said none")
    if len(text) > LONG:
        summary = join([_text(text[:LONG]), f" … ({count(len(text))} characters)"])
        body = details(summary, h("p", _text(text), class_="said"), class_="long")
    below = [*scores] if response.ended else [*scores, cut]
    return h("div", body, h("p", *below, class_="scores") if below else None)


def _text(text: str) -> Markup:
    """Untrusted text in its own element, so that its writing direction does not affect the text beside it."""
    return h("bdi", clean(text), dir="auto")
