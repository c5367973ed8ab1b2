"""The numbers behind the figures, as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.experiment.report.text import clean

FOLDER = "points"


class Points:
    """Tables of what was plotted, by name of the file."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[Sequence[str], list[Sequence[Any]]]] = {}

    def add(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
        """Keep a table; returns the name of its file, relative to the page."""
        self.tables[name] = (columns, [list(row) for row in rows])
        return f"{FOLDER}/{name}.csv"

    def files(self) -> dict[str, str]:
        """Content of each file: numbers in full precision (read back they are the same), None as an empty cell."""
        return {f"{name}.csv": _csv(columns, rows) for name, (columns, rows) in self.tables.items()}

    def write(self, directory: Path) -> None:
        """Write the files, and take away those of an earlier report that this one does not have."""
        folder = directory / FOLDER
        files = self.files()
        if files:
            folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.csv"):
            if stale.name not in files:
                stale.unlink()
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8", newline="")


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t") and text[:1] else text


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(
            ["" if cell is None else cell if isinstance(cell, float | int) else _cell(clean(cell)) for cell in row]
        )
    return buffer.getvalue()
