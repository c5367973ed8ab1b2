"""The quality of labels as tables, for the terminal and for the page."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_pipeline.labelling.figures import Quality
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.text import NOTHING, count, duration, interval_text, number, percent, short

Cell = str | Interval | None

MOST_REASONS = 20
REASON = 120
"""The most characters of a reason in a table; --json has it whole."""


class Table(NamedTuple):
    """A table: columns are named, the first cell of a row names the row."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""

    def texts(self) -> list[list[str]]:
        """The cells as text."""
        return [[cell_text(cell) for cell in row] for row in self.rows]


def cell_text(cell: Cell) -> str:
    """A cell in a terminal: a figure with its interval, or a dash where there is none."""
    return NOTHING if cell is None else interval_text(cell) if isinstance(cell, Interval) else cell


def quality_tables(found: Quality) -> list[Table]:
    """The tables that have rows: all labels, labelers, their pace, alpha, twosomes, places, times, reasons of skips."""
    made = [
        _all(found),
        _labelers(found),
        _paces(found),
        _alphas(found),
        _twosomes(found),
        _places(found),
        _times(found),
        _skips(found),
    ]
    return [table for table in made if table.rows]


def _all(found: Quality) -> Table:
    rows: list[list[Cell]] = [
        ["items labelled", f"{count(found.labelled)} of {count(found.items)}", "with at least one judgement"],
        [
            "judgements",
            count(found.judgements),
            f"{count(found.repeats)} of them repeats, {count(found.skipped)} skipped",
        ],
        ["pairs", count(found.pairs), "comparisons of two responses, without ties"],
        ["ties", found.ties, "share of comparisons"],
        ["agreement of labelers", found.agreement, "share of pairs ordered alike; a coin has 0.50, InstructGPT 0.73"],
        ["self-consistency", found.consistency, "the same on repeats; should be above the agreement"],
        ["ratings follow ranks", found.ratings, "the better-ranked response has the higher rating; should be near 1"],
        ["rated alike", found.rated_alike, "ranked pairs with equal ratings: nuance that ratings do not have"],
        ["earlier on the page wins", found.earlier_wins, "0.50 without a bias of place"],
        ["longer wins", found.longer_wins, "0.50 if length says nothing"],
        ["slope on length", found.length_slope, "log-odds of being better per 100 characters more"],
    ]
    return Table("all labels", ("figure", "value", "how to read it"), [row for row in rows if row[1] is not None])


def _labelers(found: Quality) -> Table:
    columns = ("labeler", "judgements", "agreement", "right", "reliability", "self-consistency", "ratings follow ranks")
    rows: list[list[Cell]] = [
        [
            str(one.labeler),
            count(one.judgements),
            one.agreement,
            one.right,
            one.reliability,
            one.consistency,
            one.ratings,
        ]
        for one in found.labelers
    ]
    note = (
        "right: the probability that a label names the better response, by the labeler-adjusted Bradley-Terry model; "
        "reliability: the factor of the log-odds, geometric mean 1."
    )
    return Table("labelers", columns, rows, note)


def _paces(found: Quality) -> Table:
    columns = ("labeler", "skipped", "ties", "median time", "characters/s", "hurried")
    rows: list[list[Cell]] = [
        [
            str(one.labeler),
            count(one.skipped),
            one.ties,
            duration(one.seconds),
            number(one.speed, 1),
            percent(one.hurried, 0),
        ]
        for one in found.labelers
    ]
    note = (
        "characters/s: median over items, prompt and responses; hurried: share of items read faster than anybody reads."
    )
    return Table("pace of labelers", columns, rows, note)


def _alphas(found: Quality) -> Table:
    rows: list[list[Cell]] = [
        [row.what, row.level, count(row.values), row.alpha, row.same, row.yes] for row in found.alphas
    ]
    note = (
        "alpha: 1 is full agreement, 0 is chance; 0.80 is reliable, below 0.667 nothing should be concluded. There is "
        "none where no two labelers met, or where all answers are the same. Where a flag is rare, alpha may be low "
        "although most answers are equal."
    )
    return Table("Krippendorff's alpha", ("answers", "level", "number", "alpha", "equal answers", "yes"), rows, note)


def _twosomes(found: Quality) -> Table:
    rows: list[list[Cell]] = [
        [f"{one.labelers[0]} and {one.labelers[1]}", one.agreement, count(one.agreement.clusters)]
        for one in found.twosomes
    ]
    return Table("agreement of two labelers", ("labelers", "agreement", "items"), rows)


def _places(found: Quality) -> Table:
    rows: list[list[Cell]] = [[str(place), one] for place, one in enumerate(found.places, 1)]
    note = "The order is random, so that without a bias each place wins one half."
    return Table("wins by place on the page", ("place", "wins"), rows, note)


def _times(found: Quality) -> Table:
    rows: list[list[Cell]] = [
        [str(one.item), str(one.labeler), str(one.repeat), duration(one.seconds), number(one.z, 1)]
        for one in found.outliers
    ]
    note = "Modified z-score of the log time among the labeler's own, beyond 3.5; negative: fast."
    return Table("times far from the labeler's others", ("item", "labeler", "repeat", "time", "z"), rows, note)


def _skips(found: Quality) -> Table:
    rows: list[list[Cell]] = [[short(reason, REASON), count(times)] for reason, times in found.reasons.items()]
    return Table("reasons of skips", ("reason", "times"), rows[:MOST_REASONS])
