"""Win rates and standings by people, and which scorers agree with them."""

from __future__ import annotations

from rlhf_pipeline.report.charts import interval_bar, named, span
from rlhf_pipeline.report.markup import (
    Column,
    Group,
    Markup,
    Section,
    columns,
    estimate,
    h,
    join,
    linked,
    section,
    table,
)
from rlhf_pipeline.report.points import Points, cells
from rlhf_pipeline.report.sides import HumanAgreement, HumanJudged, HumanPair
from rlhf_pipeline.report.text import NOTHING, clean, count, headed, interval_text, percent, plural, probability, words
from rlhf_pipeline.report.view import View

PAIRS = (
    *columns("lrl", "pair", "people", "from 0 to 1"),
    Column("these labelers", hint="the interval for these labelers alone, over prompts like these"),
    *columns("rr", "ties", "p"),
)
STANDINGS = columns("rlrlr", "place", "model", "Elo", "95 % interval", "comparisons")
BOUNDS = {"at least": "≥ ", "at most": "≤ "}


def human_section(view: View, points: Points) -> Section | None:
    """What people prefer, and how often each scorer shares their verdicts."""
    judged = view.results.human
    if judged is None:
        return None
    return section(
        "human",
        "Judged by people",
        _basis(judged),
        _pairs(view, judged, points),
        _agreement(view, judged),
        _standings(view, judged, points),
    )


def _basis(judged: HumanJudged) -> Markup:
    text = (
        f"In the project {clean(judged.project)}, {plural(judged.labelers, 'labeler')} compared two responses "
        f"{count(judged.comparisons)} times, on {plural(judged.prompts, 'prompt')}, without knowing which model wrote "
        f"them. Ties: {percent(judged.ties, 0)}. Skipped items: {count(judged.skipped)}."
    )
    if judged.missing:
        text += f" It has no responses of {words([clean(name) for name in judged.missing])}."
    return h("p", text)


def _pairs(view: View, judged: HumanJudged, points: Points) -> Markup:
    figures = list(dict.fromkeys(figure for pair in judged.pairs for figure in pair.judges))
    heads = [*PAIRS, *(Column(view.name_of(figure), hint="the same comparisons") for figure in figures)]
    lines = [_pair(view, pair, figures) for pair in judged.pairs]
    names = [f"{figure} {end}" for figure in figures for end in ("mean", "low", "high")]
    file = points.add(
        "people",
        ["a", "b", "comparisons", "prompts", "labelers", "mean", "low", "high", "p", "ties", *names],
        [
            [
                *(one.a, one.b, one.comparisons, one.prompts, one.labelers, *cells(one.estimate), one.p, one.ties),
                *(value for figure in figures for value in cells(one.judges.get(figure))),
            ]
            for one in judged.pairs
        ],
    )
    over = "prompts and labelers" if judged.labelers > 1 else "prompts, for this labeler alone"
    caption = (
        "How often people prefer a response of the first model to one of the second to the same prompt; a tie counts "
        f"one half. The interval is over {over}."
    )
    if judged.labelers > 1:
        caption += " These labelers: the interval for them alone, on prompts like these."
    if figures:
        caption += " The last columns: how often a scorer gives the first model's response the higher score."
    return table(heads, [Group(lines)], label="Win rates by people", caption=linked(caption, [file]))


def _pair(view: View, pair: HumanPair, figures: list[str]) -> list[object]:
    name = f"{clean(pair.a)} against {clean(pair.b)}"
    if pair.estimate is None:
        return [name, h("span", pair.why_not or NOTHING, class_="why"), *[""] * (4 + len(figures))]
    look = view.look_of(view.by_model.get(pair.a if pair.estimate.mean >= 0.5 else pair.b))
    return [
        name,
        estimate(pair.estimate, 3),
        interval_bar(pair.estimate, 0.0, 1.0, look, 0.5),
        estimate(pair.among_these, 3),
        percent(pair.ties, 0),
        probability(pair.p),
        *(estimate(pair.judges.get(figure), 3) for figure in figures),
    ]


def _agreement(view: View, judged: HumanJudged) -> Markup:
    title = h("h3", "Agreement with people")
    if not judged.agreement:
        return join([title, h("p", f"Not known: {judged.why_no_agreement}.")])
    made = [h("li", _shared(view, one)) for one in judged.agreement]
    return join([title, h("ul", *made)])


def _shared(view: View, one: HumanAgreement) -> str:
    low = one.share.low
    reading = "more often than a coin" if low is not None and low > 0.5 else "maybe no more often than a coin"
    return (
        f"{headed(view.name_of(one.figure))} ({clean(one.judge)}) shares {interval_text(one.share, 3)} of people's "
        f"{count(one.comparisons)} verdicts with a winner, p {probability(one.p)}: {reading}."
    )


def _standings(view: View, judged: HumanJudged, points: Points) -> Markup:
    title = h("h3", "Standings by people")
    if not judged.standings:
        return join([title, h("p", f"There are none: {judged.why_no_standings}.")])
    scale = span(one.elo for one in judged.standings)
    lines = []
    for place, one in enumerate(judged.standings, 1):
        look = view.look_of(view.by_model.get(one.name))
        elo = join([BOUNDS[one.bound] if one.bound and one.elo else None, estimate(one.elo, 0)])
        bar = interval_bar(one.elo, *scale, look)
        lines.append([count(place), named(look, view.title(one.name)), elo, bar, count(one.comparisons)])
    file = points.add(
        "people_elo",
        ["name", "elo", "low", "high", "bound", "comparisons"],
        [[one.name, *cells(one.elo), one.bound, one.comparisons] for one in judged.standings],
    )
    caption = (
        "Elo by Bradley-Terry from people's verdicts, the first model of the comparison at 1000; 400 points are odds "
        "of ten to one. The interval is that of the distance to that model."
    )
    made = table(STANDINGS, [Group(lines)], label="Standings by people", caption=linked(caption, [file]))
    return join([title, made])
