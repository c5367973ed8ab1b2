"""How the cost grows: DPO against length, data set, vocabulary and micro-batch, a reward model against completions.

    .venv/bin/python scripts/growth.py [--series length,data,vocabulary,completions,batch] [--threads 2] [--quick]

Measures each point in a process of its own (growth_points.py) and writes docs/growth.md and the figures beside it as
JSON. About six minutes on two free cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import BenchError, call, child_environment, dump, machine
from growth_sizes import QUICK, SERIES, THREADS, Sizes
from growth_table import document

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs/growth.md"
QUICK_OUTPUT = ROOT / "build/growth_quick.md"


def measure_point(series: str, value: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of a point, from a process of its own; with --quick from this one, since its figures mean nothing.

    Raises:
        BenchError: the process failed.
    """
    if options.quick:
        from growth_points import measure

        return json.loads(json.dumps(measure(series, value, QUICK, options.threads)))
    environment = child_environment(options.threads, folder)
    words = [series, str(value), "--threads", str(options.threads)]
    return call(sys.executable, "growth_points.py", *words, environment=environment)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All points, one after another."""
    sizes, begin = QUICK if options.quick else Sizes(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    for series in options.series:
        for value in sizes.points(series):
            for row in measure_point(series, value, options, folder):
                rows.append(row)
                took = 1e3 * statistics.median(row["seconds"]) / row["units"]
                what = f"{SERIES[series]} {value:,} {row.get('variant', '')}".rstrip()
                print(f"{what}: {took:.2f} ms each  (load {row['load'][-1]:.1f})", file=sys.stderr)
    from bench_work import LLAMA

    return {
        "command": command_of(options),
        "quick": options.quick,
        "date": datetime.date.today().isoformat(),
        "minutes": (time.perf_counter() - begin) / 60,
        "machine": machine(),
        "threads": options.threads,
        "versions": rows[0]["versions"],
        "model": {**LLAMA, **sizes.model},
        "small": {**LLAMA, **sizes.small},
        "sizes": asdict(sizes),
        "rows": [{key: value for key, value in row.items() if key != "versions"} for row in rows],
    }


def command_of(options: argparse.Namespace) -> str:
    """The command that makes these figures again."""
    words = ["python", "scripts/growth.py"]
    words += ["--series", ",".join(options.series)] if options.series != list(SERIES) else []
    words += ["--quick"] if options.quick else []
    words += ["--threads", str(options.threads)] if options.threads != THREADS else []
    return " ".join(words)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        BenchError: a series that does not exist, or no thread.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--series", default=",".join(SERIES), help="default: all")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--quick", action="store_true", help="a smoke test in one process, its figures mean nothing")
    parser.add_argument("--output", type=Path, help="default: docs/growth.md; with --quick build/growth_quick.md")
    parser.add_argument("--json", type=Path, help="default: beside the output")
    options = parser.parse_args(arguments)
    named = [name.strip() for name in options.series.split(",") if name.strip()]
    unknown = [name for name in named if name not in SERIES]
    if unknown or not named:
        raise BenchError(f"--series: found {', '.join(unknown) or 'none'}; expected some of {','.join(SERIES)}", 2)
    options.series = [name for name in SERIES if name in named]
    if options.threads < 1:
        raise BenchError(f"--threads: found {options.threads}; expected at least 1", 2)
    options.output = options.output or (QUICK_OUTPUT if options.quick else OUTPUT)
    options.json = options.json or options.output.with_suffix(".json")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    text = document(found)
    for path, content in ((options.json, dump(found)), (options.output, text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
