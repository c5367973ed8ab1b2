"""Where everything comes from: lineage with digests, exact configs, how to do it again."""

from __future__ import annotations

from typing import Any

from rlhf_pipeline.report.markup import Column, Group, Markup, details, h, join, table
from rlhf_pipeline.report.parts import Section, folded, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.text import NOTHING, clean, plain, plural
from rlhf_pipeline.report.view import View, items, records

DIGITS = 12


def lineage_section(view: View, points: Points) -> Section | None:
    """Every model that took part, its digest and what it was made from."""
    lines = []
    for entry in records(view.get("lineage")):
        digest = clean(entry.get("digest") or "")
        parents = [
            h("span", h("span", role.replace("_", " "), class_="note"), " ", h("code", parent))
            for role, parent in items(entry.get("parents"))
        ]
        lines.append(
            [
                h("code", entry.get("model")),
                clean(entry.get("stage") or NOTHING),
                h("code", digest[:DIGITS], title=digest) if digest else NOTHING,
                join(parents, ", ") if parents else NOTHING,
            ]
        )
    if not lines:
        return None
    columns = [Column("model", False), Column("stage", False), Column("digest", False), Column("made from", False)]
    caption = (
        f"First {DIGITS} digits of the SHA-256 over a version's files; results.json has them all. A version never "
        "changes."
    )
    made = table(columns, [Group(lines)], label="Lineage", caption=caption)
    return section("lineage", "Lineage", folded(f"All models and data ({len(lines)})", len(lines), made))


def reproduce_section(view: View, points: Points) -> Section | None:
    """The command, what it depends on, and the configs behind each model."""
    command = view.get("command")
    configs = items(view.get("configs"))
    body: list[Any] = []
    if command:
        body.append(h("pre", h("code", command), class_="command", tabindex="0"))
        seed, temperature = view.get("seed"), view.get("temperature")
        said = []
        if seed is not None:
            said.append(f"evaluation seed {plain(seed)}")
        if temperature is not None:
            said.append(f"temperature {plain(temperature)}")
        if said:
            body.append(
                h("p", f"With {' and '.join(said)} every model answers the same prompts with the same random numbers.")
            )
    if configs:
        made = [details(h("code", label), h("pre", h("code", text), tabindex="0")) for label, text in configs]
        body.append(h("h3", f"Exact configs ({plural(len(configs), 'model')})", class_="screen"))
        body.append(h("div", *made, class_="configs screen"))
    return section("reproduce", "How to reproduce", *body)


def footer() -> Markup:
    """Where the numbers are."""
    return h(
        "footer",
        h(
            "p",
            "Made by rlhf from ",
            h("code", "results.json"),
            " beside this page, which has every figure in full precision. The page loads nothing from anywhere.",
        ),
    )
