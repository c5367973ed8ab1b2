"""The page: title, verdict, and a section for each part with data; and its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_pipeline.disk.storage import replace_text, writing
from rlhf_pipeline.report.markup import Markup, Section, h
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.results import Results
from rlhf_pipeline.report.sections.cost import cost_section
from rlhf_pipeline.report.sections.curves import curves_section
from rlhf_pipeline.report.sections.exact import exact_section
from rlhf_pipeline.report.sections.frontier import frontier_section
from rlhf_pipeline.report.sections.human import human_section
from rlhf_pipeline.report.sections.llm_judge import llm_judge_section
from rlhf_pipeline.report.sections.overoptimisation import overoptimisation_section
from rlhf_pipeline.report.sections.provenance import footer, glossary_section, lineage_section, reproduce_section
from rlhf_pipeline.report.sections.responses import preferences_section, responses_section, samples_section
from rlhf_pipeline.report.sections.tables import ranking_section, results_section
from rlhf_pipeline.report.sections.verdict import fairness, headline, overview
from rlhf_pipeline.report.style import CSS
from rlhf_pipeline.report.text import clean, words
from rlhf_pipeline.report.view import View

PAGE = "index.html"
SECTIONS: tuple[Callable[[View, Points], Section | None], ...] = (
    fairness,
    results_section,
    frontier_section,
    curves_section,
    overoptimisation_section,
    preferences_section,
    human_section,
    llm_judge_section,
    responses_section,
    cost_section,
    ranking_section,
    exact_section,
    samples_section,
    lineage_section,
    reproduce_section,
    glossary_section,
)

# Only styles and pictures inside the page are allowed: model output can load or run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

SHORT = {
    "fair": "Fair?",
    "frontier": "Frontier",
    "preferences": "Calibration",
    "human": "People",
    "llm-judge": "LLM judge",
    "responses": "Responses",
    "exact": "Exact",
    "samples": "Samples",
    "reproduce": "Reproduce",
}
"""Short titles for the list of contents."""


def page(results: Results, points: Points) -> str:
    """The whole page as HTML that is also valid XML; plotted figures are added to `points`."""
    view = View(results)
    made = [found for make in SECTIONS if (found := make(view, points)) is not None]
    name = clean(results.name)
    lead = f"Comparison of {words([clean(arm) for arm in view.arms])}" if view.arms else "Comparison"
    links = [h("li", h("a", SHORT.get(found.ident, found.title), href=f"#{found.ident}")) for found in made]
    header = h(
        "header",
        h("h1", name),
        h("p", lead, class_="lead"),
        h("nav", h("ul", *links), aria_label="Contents"),
    )
    main = h("main", headline(view), overview(view), *(found.html for found in made))
    return document(f"{name} – rlhf report", h("div", header, main, footer()))


def document(title: str, body: Markup) -> str:
    """A page with this title and body: it has the style sheet inside and may load or run nothing."""
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=POLICY),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("meta", name="referrer", content="no-referrer"),
        h("title", title),
        h("style", Markup(CSS)),
    )
    whole = h("html", head, h("body", h("div", body, class_="sheet")), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def write_report(results: Results, directory: Path) -> Path:
    """Write index.html and points/*.csv from results.json; the same results give the same bytes.

    Returns the path of index.html.
    """
    points = Points()
    text = page(results, points)
    with writing(directory, "the report"):
        directory.mkdir(parents=True, exist_ok=True)
        points.write(directory)
        replace_text(directory / PAGE, text)
        points.remove_stale(directory)  # last: the previous page may still refer to them
    return directory / PAGE
