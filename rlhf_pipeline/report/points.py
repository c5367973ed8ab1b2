"""The plotted figures as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf_pipeline.disk.storage import replace_text
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.text import clean

FOLDER = "points"


def cells(found: Interval | None) -> tuple[float | None, float | None, float | None]:
    """Mean and both ends, where they are known."""
    if found is None:
        return None, None, None
    return (found.mean, *(found.ends or (None, None)))


class Points:
    """Tables of plotted figures, by file name."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[Sequence[str], list[Sequence[object]]]] = {}

    def add(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
        """Keep a table; returns the name of its file, relative to the page."""
        self.tables[name] = (columns, [list(row) for row in rows])
        return f"{FOLDER}/{name}.csv"

    def files(self) -> dict[str, str]:
        """Content of each file: numbers in full precision (unchanged when read back), None as an empty cell."""
        return {f"{name}.csv": _csv(columns, rows) for name, (columns, rows) in self.tables.items()}

    def write(self, directory: Path) -> None:
        """Write the files, each of them atomically."""
        for name, content in self.files().items():
            replace_text(directory / FOLDER / name, content)

    def remove_stale(self, directory: Path) -> None:
        """Remove the files of an earlier report that this report does not have."""
        for path in (directory / FOLDER).glob("*.csv"):
            if path.stem not in self.tables:
                path.unlink()


def _cell(text: str) -> str:
    """A text that a spreadsheet does not read as a formula."""
    return f"'{text}" if text.startswith(tuple("=+-@\t")) else text


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(
            ["" if cell is None else cell if isinstance(cell, float | int) else _cell(clean(cell)) for cell in row]
        )
    return buffer.getvalue()
