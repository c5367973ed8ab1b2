"""The figures of an arena as tables, for the terminal and report.html; they name models: labelers do not see them."""

from __future__ import annotations

from rlhf_pipeline.labelling.quality_tables import Cell, Table
from rlhf_pipeline.report.sides import HumanJudged
from rlhf_pipeline.report.text import NOTHING, count, interval_text, percent, probability

BOUNDS = {"at least": "≥ ", "at most": "≤ "}
WIN_RATES = ("pair", "win rate", "these labelers", "comparisons", "ties", "p")


def arena_tables(judged: HumanJudged) -> list[Table]:
    """The standings, best first, and the win rates of every pair of models."""
    over = "over prompts and labelers" if judged.labelers > 1 else "over prompts, for this labeler alone"
    note = "Elo by Bradley-Terry, the first model of the project at 1000; 400 points are odds of ten to one"
    places: list[list[Cell]] = [
        [
            one.name,
            NOTHING if one.elo is None else f"{BOUNDS.get(one.bound or '', '')}{interval_text(one.elo, 0)}",
            count(one.comparisons),
        ]
        for one in judged.standings
    ]
    rates: list[list[Cell]] = [
        [
            f"{one.a} against {one.b}",
            one.estimate if one.estimate is not None else one.why_not or NOTHING,
            one.among_these,
            count(one.comparisons),
            percent(one.ties, 0),
            probability(one.p),
        ]
        for one in judged.pairs
    ]
    said = f"no standings: {judged.why_no_standings}" if judged.why_no_standings else ""
    made = [
        Table("standings", ("model", "Elo", "comparisons"), places, f"{note}; 95 % intervals {over}"),
        Table("win rates", WIN_RATES, rates, f"A tie counts one half; 95 % intervals {over}. {said}".strip()),
    ]
    return [one for one in made if one.rows]
