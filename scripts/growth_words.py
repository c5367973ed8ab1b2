"""What growth_table.py computes from rows: costs per unit, and in words where they stop being constant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

TOLERANCE = 0.15
"""By how much a cost per unit may be above the lowest one and still count as linear."""
MIB = 2**20

Row = dict[str, Any]


def pick(rows: Sequence[Row], series: str, variant: str | None = None) -> list[Row]:
    """The rows of a series, growing."""
    found = [row for row in rows if row["series"] == series and row.get("variant") == variant]
    return sorted(found, key=lambda row: row["value"])


def values_of(rows: Sequence[Row]) -> list[int]:
    return [row["value"] for row in rows]


def step_seconds(row: Row) -> float:
    """Median time of a step."""
    return statistics.median(row["seconds"])


def per_unit(row: Row) -> float:
    """Seconds for each pair (completion) of a step."""
    return step_seconds(row) / row["units"]


def rate(row: Row) -> float:
    """GFLOP/s."""
    return row["flops"] / step_seconds(row) / 1e9


def setup_seconds(row: Row) -> float:
    """What a data set takes before the first step."""
    return sum(row["setup"].values())


def own_seconds(row: Row) -> float:
    """The same without Python's garbage collector."""
    return setup_seconds(row) - row["collector_seconds"]


def times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:,.0f} times"


def flatness(
    what: str,
    values: Sequence[int],
    costs: Sequence[float],
    flat: str = "linear throughout",
    bent: str = "not linear there",
) -> str:
    """Where a cost per unit is lowest, and where it is so far above that that the whole does not grow linearly.

    flat, bent: what to say where it is so nowhere, or somewhere.
    """
    best, limit = min(costs), f"{TOLERANCE:.0%}"
    lowest = values[costs.index(best)]
    far = [(value, cost / best) for value, cost in zip(values, costs) if cost > best * (1 + TOLERANCE)]
    if not far:
        return f"{what} is within {limit} of its lowest from {values[0]:,} to {values[-1]:,}: {flat}."
    listed = ", ".join(f"{times(ratio)} that at {value:,}" for value, ratio in far)
    return f"{what} is lowest at {lowest:,} and more than {limit} higher elsewhere: {listed}; {bent}."


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """y = fixed + slope x through the first and the last point, and how far y is off between them, relative to it."""
    slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0])
    fixed = ys[0] - slope * xs[0]
    return fixed, slope, max(abs(y / (fixed + slope * x) - 1) for x, y in zip(xs, ys))


def fits(worst: float) -> str:
    """What `line` says of the points between."""
    verdict = "linear" if worst <= TOLERANCE else "not linear"
    return f"the points between are off by at most {worst:.0%}: {verdict}"


def work_and_rate(rows: Sequence[Row], unit: str, size: Callable[[Row], float]) -> str:
    """How much of a change of the time per unit, from the first row to the last, is more FLOPs."""
    first, last = rows[0], rows[-1]
    flops = last["flops"] / size(last) / (first["flops"] / size(first))
    seconds = step_seconds(last) / size(last) / (step_seconds(first) / size(first))
    return (
        f"From {first['value']:,} to {last['value']:,} the FLOPs per {unit} become {times(flops)} what they were, the "
        f"time per {unit} {times(seconds)}; what is between them is the rate, {rate(first):.0f} GFLOP/s at first and "
        f"{rate(last):.0f} in the end."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---:"] * len(head)) + " |"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def milliseconds(row: Row, each: float = 1.0) -> str:
    """Median, smallest and largest time of a step over `each`."""
    low, middle, high = (1e3 * pick_one(row["seconds"]) / each for pick_one in (min, statistics.median, max))
    digits = 1 if middle >= 10 else 2
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def mib(count: float | None) -> str:
    return "-" if count is None else f"{count / MIB:,.0f}"


def ratio(count: float | None, other: float | None) -> str:
    return f"{count / other:.2f}" if count is not None and other else "-"
