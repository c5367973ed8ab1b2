"""Profile this package's side of bench.py: torch's profiler over the timed steps of each stage.

    .venv/bin/python scripts/bench_profile.py [--hh FILE] [--stages dpo,reward,...] [--bf16] [--examples N]
                                              [--threads N] [--model FOLDER [--lora RANK]]

Adds up the operators' own time by purpose and prints a table of shares of the time that all operators take on the
calling thread. The profiler itself costs a few percent, mostly between the operators.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

# The time of an operator counts for the first group whose pattern matches its name.
GROUPS = {
    "products with weights": r"^aten::(mm|addmm|linear|matmul)$",
    "attention's products": r"^aten::(bmm|baddbmm|_scaled_dot_product.*|_flash.*)$",
    "softmax and log-softmax": r"softmax|logsumexp|^aten::(exp|exp_|amax|max)$",
    "optimizer": r"adam|^Optimizer|_foreach_norm|linalg_vector_norm|_foreach_mul",
    "copies and joins": r"^aten::(copy_|cat|_to_copy|clone|contiguous|index.*|gather|scatter.*|fill_|zero_|zeros"
    r"|stack)$",
    "multiplications, additions and the like": r"^aten::(mul|mul_|add|add_|sub|sub_|div|neg|rsqrt|pow|mean|sum|silu.*"
    r"|sigmoid.*|where|addcmul.*|cumsum|square|sqrt)$",
}
REST = "everything else"


def shares(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The share of each group in the time of all operators.

    Args:
        times: the name of each operator and its own time, without that of the operators it calls.
    """
    totals = dict.fromkeys([*GROUPS, REST], 0.0)
    for name, time in times:
        group = next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), REST)
        totals[group] += time
    whole = sum(totals.values())
    return {group: total / whole for group, total in totals.items()} if whole else totals


def profile_stage(stage: str, work: dict[str, Any], bf16: bool) -> tuple[dict[str, float], float]:
    """The shares for the timed steps of one stage, and their seconds under the profiler."""
    import bench_ours
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])

    tick = bench_ours.Stopwatch.tick

    def ticked(watch: Any, *figures: Any) -> None:
        tick(watch, *figures)
        if len(watch.times) == watch.warmup + 1:  # the end of the warm-up
            profiler.start()

    with mock.patch.object(bench_ours.Stopwatch, "tick", ticked):
        watch = bench_ours.measure(stage, work, bf16)
        profiler.stop()
    found = profiler.key_averages()
    return shares((item.key, item.self_cpu_time_total) for item in found), watch.times[-1] - watch.times[watch.warmup]


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each group, a column for each stage."""
    lines = ["| share of the operators' time | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        f"| {group} | " + " | ".join(f"{100 * found[group]:.0f}%" for found in columns.values()) + " |"
        for group in (*GROUPS, REST)
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    from bench_table import STAGES, TITLES
    from bench_work import PRETRAINED, Sizes, prepare

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hh", type=Path, metavar="FILE", help="preference pairs; without it a synthetic set")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: all")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--examples",
        type=int,
        default=160,
        help="examples for SFT, reward model and DPO; PPO: one rollout of 32 (without --model)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a pretrained policy, with its own work")
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank (with --model)"
    )
    options = parser.parse_args(arguments)
    stages = [stage for stage in options.stages.split(",") if stage]
    if unknown := [stage for stage in stages if stage not in TITLES]:
        parser.error(f"--stages: found {', '.join(unknown)}; expected some of {','.join(TITLES)}")
    import torch

    torch.set_num_threads(options.threads)
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(examples=options.examples, episodes=Sizes().rollout)
        if options.model:
            sizes = replace(PRETRAINED, lora=options.lora)
        work = prepare(Path(folder), options.hh, sizes, options.threads, options.model)
        for stage in stages:
            columns[TITLES[stage]], seconds = profile_stage(stage, work, options.bf16)
            print(f"{TITLES[stage]}: {seconds:.1f} s under the profiler", file=sys.stderr)
    print(table(columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
