"""The quality of labels as one self-contained page, in the style of the comparison report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlhf_pipeline.disk.storage import replace_text, writing
from rlhf_pipeline.labelling.arena import arena_of
from rlhf_pipeline.labelling.arena_tables import arena_tables
from rlhf_pipeline.labelling.figures import Quality
from rlhf_pipeline.labelling.kinds import Item, Judgement
from rlhf_pipeline.labelling.quality import measure_quality
from rlhf_pipeline.labelling.quality_tables import Cell, Table, quality_tables
from rlhf_pipeline.report.charts import NARROW, WIDE, interval_bar
from rlhf_pipeline.report.drawing import colour, draw, dress, mark
from rlhf_pipeline.report.markup import Column, Group, Markup, estimate, folded, h, join, section, table
from rlhf_pipeline.report.page import document
from rlhf_pipeline.report.style import Look
from rlhf_pipeline.report.text import clean, interval_text, percent, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT = "report.html"
LOOK = Look("hue-0", "o")
TEXTS = frozenset({"figure", "how to read it", "answers", "level", "labelers", "reason", "pair", "model"})
"""Columns of text; the others have numbers."""


class Labels(Protocol):
    """What is read of a labelling project (`labelling.store.LabelStore`)."""

    def items(self) -> Sequence[Item]:
        """All items."""

    def judgements(self) -> Sequence[Judgement]:
        """All finished tasks."""


def write_report(labels: Labels, directory: Path, name: str) -> Quality:
    """Measure the labels of the project `name` and write report.html into its folder; returns the figures.

    The file also says which models people prefer, so it is not for labelers.
    """
    judgements = labels.judgements()
    items = labels.items()  # read last: items that are added in between have no judgement yet
    found, arena = measure_quality(items, judgements), arena_of(name, items, judgements)
    with writing(directory, "the report"):
        models = [] if arena is None else arena_tables(arena.judged())
        replace_text(directory / REPORT, quality_page(found, name, models))
    return found


class LivePage:
    """The page of a project that is being labelled: measured anew only if there are other judgements than before."""

    def __init__(self, labels: Labels, name: str):
        self._labels, self._name = labels, name
        self._made: tuple[Sequence[Judgement], str] | None = None

    def text(self) -> str:
        """The page; it may take seconds."""
        judgements = self._labels.judgements()
        if self._made is None or self._made[0] != judgements:
            self._made = judgements, quality_page(measure_quality(self._labels.items(), judgements), self._name)
        return self._made[1]


def quality_page(found: Quality, name: str, models: Sequence[Table] = ()) -> str:
    """The page as HTML that is also valid XML; it names labelers by number and shows no source of a response.

    models: tables of an arena, which name the models; labelers must not see them.
    """
    header = h("header", h("h1", clean(name)), h("p", "Quality of the labels", class_="lead"))
    made = {one.title: one for one in quality_tables(found)}
    parts = [
        section("models", "Models", *_html({one.title: one for one in models}, *(one.title for one in models))),
        section("all", "All labels", *_html(made, "all labels")),
        section("labelers", "Labelers", _rights(found), *_html(made, "labelers", "agreement of two labelers")),
        section("alpha", "Agreement beyond chance", *_html(made, "Krippendorff's alpha")),
        section("place", "Place on the page", _places(found), *_html(made, "wins by place on the page")),
        section(
            "time",
            "Time and skips",
            *_html(made, "pace of labelers", "times far from the labeler's others", "reasons of skips"),
        ),
    ]
    main = h("main", _summary(found), *(part.html for part in parts if part is not None))
    footer = h("footer", h("p", "Made by rlhf label report. The page loads nothing from outside."))
    return document(f"{clean(name)} – quality of labels", h("div", header, main, footer))


def _summary(found: Quality) -> Markup:
    """One sentence, and the findings."""
    said = f"{plural(found.judgements, 'judgement')} of {plural(found.labelled, 'item')}"
    said += f" by {plural(sum(one.judgements > 0 for one in found.labelers), 'labeler')}"
    if found.agreement is not None:
        said += f"; two labelers agree on {percent(found.agreement.mean, 0)} of pairs"
    body = [h("p", "Quality", class_="eyebrow"), h("p", f"{said}.", class_="headline")]
    if found.findings:
        body.append(h("ul", *(h("li", one[:1].upper() + one[1:] + ".") for one in found.findings)))
    else:
        body.append(h("p", "Nothing stands out."))
    return h("section", *body, class_="verdict", aria_label="Summary")


def _html(made: dict[str, Table], *titles: str) -> list[Markup]:
    """The tables with these titles that are there; long ones folded, all but the first with a heading."""
    return [
        join(
            [
                h("h3", one.title.capitalize()) if place else None,
                folded(f"All {len(one.rows)}", len(one.rows), _table(one)),
            ]
        )
        for place, title in enumerate(titles)
        if (one := made.get(title)) is not None
    ]


def _table(one: Table) -> Markup:
    columns = [Column(title, title not in TEXTS) for title in one.columns]
    rows = [[_cell(cell, title) for cell, title in zip(row, one.columns, strict=True)] for row in one.rows]
    return table(columns, [Group(rows)], label=f"Table: {one.title}", caption=one.note or None)


def _cell(cell: Cell, title: str) -> object:
    if title == "how to read it":
        return h("span", cell, class_="why")
    return cell if isinstance(cell, str) else estimate(cell)


def _rights(found: Quality) -> Markup | None:
    """How often each labeler is right, as intervals on one scale."""
    known = [(one.labeler, one.right) for one in found.labelers if one.right is not None]
    if not known:
        return None
    rows = [
        [f"labeler {labeler}", estimate(right), interval_bar(right, 0.0, 1.0, LOOK, 0.5)] for labeler, right in known
    ]
    columns = [Column("labeler", False), Column("right"), Column("0 to 1; the line is a coin", False)]
    return table(columns, [Group(rows)], label="How often each labeler is right")


def _places(found: Quality) -> Markup | None:
    """Win share by place, drawn for a wide page and for a narrow one."""
    if len(found.places) < 2:
        return None

    def paint(axes: Axes) -> None:
        axes.axhline(0.5, color=colour("muted"), lw=1.2, ls="--", zorder=1)
        for place, one in enumerate(found.places, 1):
            mark(axes, place, one.mean, LOOK, upright=one.ends)
        axes.set_xticks(range(1, len(found.places) + 1))
        axes.set_xlim(0.5, len(found.places) + 0.5)
        dress(axes, "place on the page", "share of comparisons won")

    said = ", ".join(f"place {place}: {interval_text(one)}" for place, one in enumerate(found.places, 1))
    shapes = {"place-wide": ((WIDE[0], 300), "wide"), "place-narrow": ((NARROW[0], 280), "narrow")}
    drawn = [
        draw(ident, "Wins by place on the page", said, paint, size=size, class_=class_)
        for ident, (size, class_) in shapes.items()
    ]
    caption = "Wins by place, with 95 % intervals over items. On the dashed line the place has no influence."
    return h("figure", *drawn, h("figcaption", caption), class_="chart")
