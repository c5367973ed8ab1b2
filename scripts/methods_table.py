"""Print what each arm of an experiment gained and cost, and how far it is from its optimum, from results.json.

    python scripts/methods_table.py rlhf_home/reports/family/results.json

Prints Markdown; docs/methods.md explains the columns.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from rlhf_pipeline.errors import RlhfError
from rlhf_pipeline.report import load
from rlhf_pipeline.report.figures import ExactRow, Interval
from rlhf_pipeline.report.results import Results


def interval(found: Interval | None) -> str:
    """An interval as text: mean [low, high]."""
    return "-" if found is None else f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def mean_of(values: list[float], form: str = ".2f") -> str:
    """The mean as text, - of nothing."""
    return format(fmean(values), form) if values else "-"


def own_distance(rows: list[ExactRow]) -> str:
    """beta KL(pi || the optimum of the reward that the arm was trained on): known where there is such a reward."""
    return mean_of([row.optimisation_gap.value for row in rows if row.optimisation_gap is not None])


def table(results: Results) -> list[str]:
    """One line for each arm, best true reward first."""
    arm_of = {row.model: row.arm for row in results.rows}
    exact: dict[str, list[ExactRow]] = {}
    for row in results.exact.rows if results.exact is not None else []:
        if row.model in arm_of:
            exact.setdefault(arm_of[row.model], []).append(row)
    lines = [
        "| arm | kind | true reward | KL | below the frontier | from its own optimum | from pi* | TFLOP | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    figure = next(name for name in ("true_reward", "score") if name in results.summary[0].metrics)
    for summary in sorted(results.summary, key=lambda found: -found.metrics[figure].mean):
        rows = exact.get(summary.arm, [])
        entry = results.arms.get(summary.arm)
        cost = entry.cost if entry is not None else None
        cells = (
            summary.arm,
            summary.optimum if summary.beta is not None or summary.optimum != "same" else "-",  # SFT aims at no reward
            interval(summary.metrics[figure]),
            interval(summary.metrics.get("kl")),
            mean_of([row.below_frontier for row in rows if row.below_frontier is not None]),
            own_distance(rows),
            mean_of([row.gap_true.value for row in rows if row.gap_true is not None]),
            "-" if cost is None or cost.flops is None else f"{cost.flops / 1e12:.2f}",
            "-" if cost is None or cost.wall_seconds is None else f"{cost.wall_seconds:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str]) -> int:
    try:
        for path in arguments:
            print("\n".join(table(load(Path(path)))), end="\n\n")
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
