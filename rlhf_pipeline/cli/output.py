"""stdout carries the result: tables for people, or exactly one JSON object."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pipeline.errors import UNSEEN, visible


def emit_json(value: Any) -> None:
    """Print one JSON object, NaN and infinities as null."""

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): clean(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [clean(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    text = json.dumps(clean(value), ensure_ascii=False, default=str)
    sys.stdout.write(UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def printer():
    """A rich console on stdout, wide enough for tables where there is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else max(200, shutil.get_terminal_size().columns)
    return Console(width=width, highlight=False)


def emit_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the rest right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    printer().print(table)


def emit_lines(lines: Sequence[str]) -> None:
    """Print plain lines."""
    for line in lines:
        sys.stdout.write(visible(line) + "\n")


def number(value: Any, digits: int = 3) -> str:
    """A figure for a table: a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def interval(estimate: Mapping[str, Any] | None, digits: int = 2) -> str:
    """mean ± half width of the 95 % interval (or [low, high] where it is lopsided)."""
    if not estimate or estimate.get("mean") is None:
        return "-"
    mean, low, high = estimate["mean"], estimate.get("low"), estimate.get("high")
    if low is None or high is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) rows of nested metrics."""
    rows: list[tuple[str, str]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows += flat_metrics(value, f"{prefix}{name} ")
        elif not isinstance(value, list | tuple):
            rows.append((f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else number(value)))
    return rows
