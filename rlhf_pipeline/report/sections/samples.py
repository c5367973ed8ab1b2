"""Responses of all models to the same prompts, side by side. Model output is untrusted: text and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.report.markup import Markup, details, h, join
from rlhf_pipeline.report.palette import NEUTRAL
from rlhf_pipeline.report.parts import Section, named, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import clean, count, finite, number, plural
from rlhf_pipeline.report.view import View, items, records

LONG = 600
"""Characters of a response that are shown before one has to open it."""

AT_ONCE = 4
"""Models that are shown side by side; the others have to be opened."""

SCORES = ("true_reward", "judge", "score")


def samples_section(view: View, points: Points) -> Section | None:
    """A card for each model and prompt."""
    made = []
    for entry in records(view.get("samples_shown")):
        responses = [(name, records(found)) for name, found in items(entry.get("responses"))]
        responses = [(name, found) for name, found in responses if found]
        if responses:
            made.append(_prompt(view, entry.get("prompt"), responses))
    if not made:
        return None
    intro = h("p", "The same prompts for all models; what each response scored stands below it.")
    return section("samples", "Samples, side by side", intro, *made)


def _prompt(view: View, prompt: Any, responses: list[tuple[str, list[Mapping[str, Any]]]]) -> Markup:
    first = _shown_first(view, [name for name, _ in responses])
    cards = {name: _card(view, name, found) for name, found in responses}
    rest = [cards[name] for name, _ in responses if name not in first]
    more = details(f"{plural(len(rest), 'other model')}", h("div", *rest, class_="cards")) if rest else None
    quoted = h("h3", _text(prompt or "(empty prompt)"), class_="prompt")
    return h("article", quoted, h("div", *(cards[name] for name in first), class_="cards"), more, class_="sample")


def _shown_first(view: View, names: list[str]) -> list[str]:
    """The baseline and one model of each arm, of the selected setting where one is; all where they are few."""
    if len(names) <= AT_ONCE:
        return names
    rows = {str(row.get("name")): row for row in view.rows}
    known = [name for name in names if name in rows]
    first = [name for name in known if view.is_baseline(rows[name])][:1]
    for arm in view.arms:
        ours = [name for name in known if view.arm(rows[name]) == arm and name not in first]
        ours.sort(key=lambda name: not view.is_selected(rows[name]))  # stable: the first seed of the selected setting
        first += ours[:1]
    first += [name for name in names if name not in first][: max(0, 2 - len(first))]
    return first[:AT_ONCE]


def _card(view: View, name: str, found: list[Mapping[str, Any]]) -> Markup:
    row = next((row for row in view.rows if row.get("name") == name), None)
    look = view.look_of(row) if row is not None else NEUTRAL
    return h(
        "div",
        h("h4", named(look, view.title(row) if row is not None else name)),
        *(_response(view, item) for item in found),
        class_="card",
        style=f"border-top-color:{look.css}",
    )


def _response(view: View, response: Mapping[str, Any]) -> Markup:
    raw = response.get("text")
    text = clean("" if raw is None else raw)
    ended = response.get("ended")
    end = (
        h("span", "cut", class_="chip quiet", title="cut at the longest response, without an end token")
        if ended is False
        else None
    )
    scores = [
        h("span", f"{view.name_of(name)} ", h("b", number(response.get(name))))
        for name in SCORES
        if finite(response.get(name)) is not None
    ]
    body = h("p", _text(text), class_="said") if text.strip() else h("p", "(nothing)", class_="said none")
    if len(text) > LONG:
        body = details(
            join([_text(text[:LONG]), f" … ({count(len(text))} characters)"]),
            h("p", _text(text), class_="said"),
            class_="long",
        )
    return h("div", body, h("p", *scores, end, class_="scores") if scores or end else None)


def _text(text: Any) -> Markup:
    """Untrusted text in a box of its own, so that its direction of writing does not reach what stands beside it."""
    return h("bdi", clean(text), dir="auto")
