"""The page: title and verdict, then a section for everything there are data for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_pipeline.report.markup import Markup, h, join
from rlhf_pipeline.report.parts import Section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.sections.cost import cost_section
from rlhf_pipeline.report.sections.curves import curves_section
from rlhf_pipeline.report.sections.exact import exact_section
from rlhf_pipeline.report.sections.frontier import frontier_section
from rlhf_pipeline.report.sections.glossary import glossary_section
from rlhf_pipeline.report.sections.overoptimisation import overoptimisation_section
from rlhf_pipeline.report.sections.preferences import preferences_section
from rlhf_pipeline.report.sections.provenance import footer, lineage_section, reproduce_section
from rlhf_pipeline.report.sections.ranking import ranking_section
from rlhf_pipeline.report.sections.responses import responses_section
from rlhf_pipeline.report.sections.samples import samples_section
from rlhf_pipeline.report.sections.table import results_section
from rlhf_pipeline.report.sections.verdict import fairness, headline, overview
from rlhf_pipeline.report.style import CSS
from rlhf_pipeline.report.text import clean, words
from rlhf_pipeline.report.view import View

SECTIONS: tuple[Callable[[View, Points], Section | None], ...] = (
    fairness,
    results_section,
    frontier_section,
    curves_section,
    overoptimisation_section,
    preferences_section,
    responses_section,
    cost_section,
    ranking_section,
    exact_section,
    samples_section,
    lineage_section,
    reproduce_section,
    glossary_section,
)

# Nothing may be loaded or run, whatever a model wrote: styles and pictures that are part of the page, and no more.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

SHORT = {
    "fair": "Fair?",
    "frontier": "Frontier",
    "preferences": "Calibration",
    "responses": "Responses",
    "exact": "Exact",
    "samples": "Samples",
    "reproduce": "Reproduce",
}
"""Titles in the list of contents, where the heading is too long for it."""


def page(results: dict[str, Any], points: Points) -> str:
    """The whole page as HTML that is XML as well; what is plotted is kept in `points`."""
    view = View(results)
    made = [found for make in SECTIONS if (found := make(view, points)) is not None]
    name = clean(results.get("name") or "comparison")
    arms = words([clean(arm) for arm in view.arms])
    header = h(
        "header",
        h("h1", name),
        h("p", f"Comparison of {arms}" if arms else "Comparison", class_="lead"),
        _contents(made) if len(made) > 1 else None,
    )
    main = h("main", headline(view), overview(view), *(found.html() for found in made))
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=POLICY),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("meta", name="referrer", content="no-referrer"),
        h("title", f"{name} – rlhf report"),
        h("style", Markup(CSS)),
    )
    body = h("body", h("div", h("div", header, main, footer()), class_="sheet"))
    return f"<!DOCTYPE html>\n{h('html', head, body, lang='en')}\n"


def _contents(made: list[Section]) -> Markup:
    entries = [h("li", h("a", SHORT.get(found.ident, found.title), href=f"#{found.ident}")) for found in made]
    return h("nav", h("ul", join(entries)), aria_label="Contents")
