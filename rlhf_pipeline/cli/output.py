"""Output of results to stdout: tables for people, or exactly one JSON object."""

from __future__ import annotations

import json as json_module
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.api import printable
from rlhf_pipeline.errors import UNSEEN, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rlhf_pipeline.report.figures import Interval


def emit_json(value: Any) -> None:
    """Print one JSON object; parts of results.json keep their form, NaN and infinities become null."""
    text = json_module.dumps(printable(value), ensure_ascii=False, default=str)
    sys.stdout.write(UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def emit(value: Any, lines: Sequence[str], *, json: bool) -> None:
    """Print one JSON object, or lines for people."""
    if json:
        emit_json(value)
    else:
        emit_lines(lines)


def emit_plan(plan: Mapping[str, Any], undone: str, *, json: bool) -> None:
    """Print the result of a dry run, with what it says of its data and its notes below the table."""
    if json:
        emit_json(plan)
        return
    emit_table(f"dry run: {undone}", ("what", "value"), flat_metrics(plan))
    emit_lines([*plan.get("data", ()), *plan.get("about", ()), *(f"note: {note}" for note in plan.get("notes", ()))])


def printer() -> Console:
    """A rich console on stdout, wide enough for tables if stdout is not a terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else max(200, shutil.get_terminal_size().columns)
    return Console(width=width, highlight=False)


NARROWEST = 20
"""The least width of the values in a table of keys and values; with less room they are printed below their keys."""


def emit_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, folds: Sequence[str] = ()) -> None:
    """Print a table; the first column is left-aligned, the rest right-aligned, and nothing is cut.

    If the table is wider than the terminal, the values of a table of keys and values are folded, and columns named in
    `folds` are folded between words; any other table is transposed, with as many rows side by side as fit.
    """
    names, cells = [visible(name) for name in columns], [[visible(cell) for cell in row] for row in rows]
    console, text = printer(), visible(title)
    widths = _widths([names, *cells])
    least = list(widths)
    for place, column in enumerate(zip(names, *cells, strict=True)):
        if names[place] in folds:
            least[place] = max(cell_width(word) for cell in column for word in cell.split())
    if _total(widths) <= console.width:
        console.print(_table(text, names, cells))
    elif len(names) == 2:
        _print_pairs(console, text, names, cells)
    elif any(name in folds for name in names) and _total(least) <= console.width:
        console.print(_table(text, names, cells, folds=folds))
    else:
        _print_turned(console, text, names, cells)


def cell_width(text: str) -> int:
    """Number of terminal columns that a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column of a table, including its header."""
    return [max(map(cell_width, column)) for column in zip(*rows, strict=True)]


def _total(widths: Sequence[int]) -> int:
    """The width of a table with these columns, including padding and borders."""
    return sum(widths) + 3 * len(widths) + 1


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], *, folds: Sequence[str] = ()) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, name in enumerate(names):
        justify: Any = "left" if number == 0 or name in folds else "right"
        table.add_column(Text(name), justify=justify, no_wrap=name not in folds, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print_pairs(console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print keys and values: long values fold beside their keys, or below them if there is no room."""
    from rich.padding import Padding
    from rich.text import Text

    longest = max(cell_width(row[0]) for row in [names, *rows])
    if _total([longest, NARROWEST]) <= console.width:
        console.print(_table(title, names, rows, folds=names[1:]))
        return
    console.print(Text(title, style="bold"))
    for key, value in rows:
        console.print(Text(key))
        console.print(Padding(Text(value), (0, 0, 0, 2)))
    console.print()


def _print_turned(console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a transposed table, split into several tables if it is too wide."""
    from rich.text import Text

    if not rows:
        console.print(Text(title, style="bold"))
        console.print(Text(", ".join(names)))
        return
    groups: list[list[Sequence[str]]] = []
    for row in rows:
        if groups and _total(_widths(list(zip(names, *groups[-1], row, strict=True)))) <= console.width:
            groups[-1].append(row)
        else:
            groups.append([row])
    for number, group in enumerate(groups):
        heads, *turned = zip(names, *group, strict=True)
        above = title if number == 0 else ""
        if _total(_widths([heads, *turned])) <= console.width:
            console.print(_table(above, heads, turned))
            continue
        if above:
            console.print(Text(above, style="bold"))
        _print_pairs(console, group[0][0], (names[0], ""), list(zip(names[1:], group[0][1:], strict=True)))


def emit_lines(lines: Sequence[str]) -> None:
    """Print plain lines."""
    for line in lines:
        sys.stdout.write(visible(line) + "\n")


def number(value: Any, digits: int = 3) -> str:
    """A figure for a table; a dash if there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def interval(estimate: Interval | None, digits: int = 2) -> str:
    """mean ± half of the 95 % interval if it is symmetric in the printed digits, else mean [low, high]."""
    if estimate is None:
        return "-"
    mean = estimate.mean
    if estimate.ends is None:
        return f"{mean:.{digits}f}"
    low, high = estimate.ends
    if abs((high - mean) - (mean - low)) < 0.5 * 10**-digits:
        return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) rows of nested metrics."""
    rows: list[tuple[str, str]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows += flat_metrics(value, f"{prefix}{name} ")
        elif not isinstance(value, list | tuple):
            rows.append((f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else number(value)))
    return rows
