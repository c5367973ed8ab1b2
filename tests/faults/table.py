"""docs/faults.md: what `make faults` did and what came of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

HOW = """\
Every kind of fault is seeded: `python -m tests.faults.run --only KIND --seed N` repeats a failure. Most trials run real
commands in children forked from a parent that has imported everything; some trials of each kind run in a fresh process.
The time of a kind is divided evenly among its rows."""
NOT_SEEN = """\
Not covered: a power failure (files and folders are synced in an order that should survive one, but nobody has cut the
power), file systems without locks (except for one test), several machines, a GPU that runs out of memory."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, what came of it, and the trials that failed."""

    what: str
    came: str
    failed: list[Any]
    seconds: float = 0.0


def table(rows: Sequence[Row]) -> str:
    """Markdown: what was done, what came of it, how long it took."""
    lines = ["| fault | result | failed | time |", "| --- | --- | ---: | ---: |"]
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
