"""docs/faults.md: what `make faults` did and what came of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

HOW = """\
Every kind is seeded: a failure can be had again with `python -m tests.faults.run --only KIND --seed N`. Real commands
run in children that are forked from a parent which has everything imported, and some of each kind in processes of their
own. The rows of one kind share its time evenly."""
NOT_SEEN = """\
What it does not see: a power failure (files and folders are synced, in an order that allows for one, but nobody has
pulled a plug), file systems without locks beyond one test, more than one machine, a GPU that runs out of memory."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, what came of it, and the trials that failed."""

    what: str
    came: str
    failed: list[Any]
    seconds: float = 0.0


def table(rows: Sequence[Row]) -> str:
    """Markdown: what was done, what came of it, how long it took."""
    lines = ["| what is done | what comes of it | failed | time |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {row.what} | {row.came} | {len(row.failed)} | {row.seconds:.0f} s |" for row in rows]
    return "\n".join(lines)


def document(rows: Sequence[Row], seed: int) -> str:
    """docs/faults.md."""
    total = sum(row.seconds for row in rows)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    return "\n".join(
        (
            "# Faults",
            "",
            f"Made by `make faults` in {total / 60:.0f} minutes, seed {seed}. Python {platform.python_version()}, "
            f"{packages}.",
            HOW,
            "",
            table(rows),
            "",
            NOT_SEEN,
            "",
        )
    )
