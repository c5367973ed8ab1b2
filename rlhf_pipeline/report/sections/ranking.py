"""A ranking of everything that was compared, from the comparisons of pairs."""

from __future__ import annotations

from rlhf_pipeline.report.markup import Column, Group, join, table
from rlhf_pipeline.report.palette import NEUTRAL, Look
from rlhf_pipeline.report.parts import Section, estimate, interval_bar, linked, named, section, span
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import count, finite, percent
from rlhf_pipeline.report.view import View, reading, records

MANY = 20
"""Entries beyond which only the best snapshot of each arm is shown."""


BOUNDS = {"at least": "≥ ", "at most": "≤ "}


def ranking_section(view: View, points: Points) -> Section | None:
    """Elo with intervals, best first."""
    entries = {str(entry.get("name")): entry for entry in records(view.get("ranking", "rows"))}
    known = [(name, reading(entry.get("elo"))) for name, entry in entries.items()]
    found = sorted(((name, elo) for name, elo in known if elo is not None), key=lambda entry: -entry[1].mean)
    if not found:
        return None
    file = points.add(
        "ranking",
        ["name", "elo", "low", "high", "bound", "ties"],
        [[name, *elo.cells, entries[name].get("bound"), entries[name].get("ties")] for name, elo in found],
    )
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
                join([BOUNDS.get(str(entries[name].get("bound"))), estimate(elo, 0)]),
                interval_bar(elo, *scale, look),
                percent(entries[name].get("ties"), 0),
            ]
        )
    columns = [Column("place"), Column("model", False), Column("Elo"), Column("95 % interval", False), Column("ties")]
    text = (
        "Bradley-Terry strengths from responses to the same prompts, on the scale of Elo: 100 points more are a win "
        "rate of 64 %, 200 of 76 %. Models whose intervals overlap much are not told apart. A tie is half a win for "
        "each, which draws models together: the last column has the share of ties in a model's comparisons."
    )
    if view.get("ranking", "separable") is True:
        text += (
            " ≥ and ≤: some models never lost to the others, so no Elo is the most likely one; the figure is the end "
            "of the 95 % interval that this number of prompts allows."
        )
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
