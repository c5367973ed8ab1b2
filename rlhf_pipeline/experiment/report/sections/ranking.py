"""A ranking of everything that was compared, from the comparisons of pairs."""

from __future__ import annotations

from rlhf_pipeline.experiment.report.markup import Column, Group, table
from rlhf_pipeline.experiment.report.palette import NEUTRAL, Look
from rlhf_pipeline.experiment.report.parts import Section, estimate, interval_bar, linked, named, section, span
from rlhf_pipeline.experiment.report.points import Points
from rlhf_pipeline.experiment.report.text import count, finite
from rlhf_pipeline.experiment.report.view import View, reading, records

MANY = 20
"""Entries beyond which only the best snapshot of each arm is shown."""


def ranking_section(view: View, points: Points) -> Section | None:
    """Elo with intervals, best first."""
    known = [(str(entry.get("name")), reading(entry.get("elo"))) for entry in records(view.get("ranking", "rows"))]
    found = sorted(((name, elo) for name, elo in known if elo is not None), key=lambda entry: -entry[1].mean)
    if not found:
        return None
    file = points.add("ranking", ["name", "elo", "low", "high"], [[name, *elo.cells] for name, elo in found])
    by_name = {str(row.get("name")): row for row in [*view.snapshots, *view.rows]}
    hidden = _hidden(view, [name for name, _ in found])
    scale = span(elo for _, elo in found)
    lines = []
    for place, (name, elo) in enumerate(found, 1):
        if name in hidden:
            continue
        row = by_name.get(name)
        look: Look = view.look_of(row) if row is not None else NEUTRAL
        lines.append(
            [
                count(place),
                named(look, view.title(row) if row is not None else name),
                estimate(elo, 0),
                interval_bar(elo, *scale, look),
            ]
        )
    columns = [Column("place"), Column("model", False), Column("Elo"), Column("95 % interval", False)]
    text = (
        "Bradley-Terry strengths from responses to the same prompts, on the scale of Elo: 100 points more are a win "
        "rate of 64 %, 200 of 76 %. Models whose intervals overlap much are not told apart."
    )
    if view.get("ranking", "separable") is True:
        text += " Some models never lost to the others: how far they are ahead of these is not known."
    if hidden:
        text += " Of the snapshots only the best of each arm is shown (best on these very prompts, so flattered)"
        text += f"; {count(len(hidden))} more are in the CSV."
    if left_out := finite(view.get("ranking", "left_out")):
        text += f" {count(left_out)} more models were left out."
    caption = linked(text, [file])
    return section("ranking", "Ranking", table(columns, [Group(lines)], label="Ranking", caption=caption))


def _hidden(view: View, ranked: list[str]) -> set[str]:
    """Where the list is long, the snapshots that are not the best of their arm; `ranked`: best first."""
    if len(ranked) <= MANY:
        return set()
    arms = {str(row.get("name")): view.arm(row) for row in view.snapshots}
    finals = {str(row.get("name")) for row in view.rows}
    passed = [name for name in ranked if name in arms and name not in finals]
    best = {arms[name]: name for name in reversed(passed)}
    return set(passed) - set(best.values())
