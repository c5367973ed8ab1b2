"""`rlhf compare`: the command, and the tables of a comparison."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.evaluate import MEASURING_KEYS, NAMES, emit_measuring
from rlhf_pipeline.cli.exact_table import print_exact
from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, Settings, command, references_and_overrides
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table, interval, number

KEYS = ("baseline", "name", *MEASURING_KEYS, "snapshots", "allow_mismatch")


def compare(
    common: Common,
    settings: Settings,
    references: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REF|KEY=VALUE]...", help="Models; overrides of the config.", show_default=False),
    ] = None,
) -> None:
    """Compare policies on the same prompts with the same random numbers; writes reports/NAME/ with index.html."""
    arms, overrides = references_and_overrides(references or [])
    config = settings.load(overrides, arms=arms or None).config
    if common.dry_run:
        emit_measuring(common, config, [*config.arms, *([config.baseline] if config.baseline else [])])
        return
    load_libraries()
    from rlhf_pipeline.compare.run import run_compare

    result = run_compare(config, common.home_path, command=shlex.join(["rlhf", *sys.argv[1:]]))
    if common.json:
        emit_json(result)
    else:
        print_comparison(result)


SHOWN = ("true_reward", "judge", "score", "kl", "well_formed", "ended", "length")


def setting_text(setting: dict[str, Any]) -> str:
    """`beta 0.1`, or a dash."""
    return (
        ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in setting.items()
        )
        or "-"
    )


def _rescaled(rows: list[dict[str, Any]]) -> bool:
    """Whether a model's price of KL is known in units of its labels' reward."""
    return any((row.get("effective_beta") or {}).get("mean") is not None for row in rows)


def _model_rows(result: dict[str, Any], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """One line for each model."""
    primary, rescaled = result["primary"], _rescaled(result["rows"])
    rows = []
    for row in result["rows"]:
        cells = [row["name"], "-" if row.get("beta") is None else f"{row['beta']:g}"]
        if rescaled:
            cells.append(number((row.get("effective_beta") or {}).get("mean"), 2))
        for name in names:
            bound = name == "kl" and "kl_bound" in row
            cells.append(f"<= {row['kl_bound']:.2f}" if bound else interval(row["metrics"].get(name)))
        if primary:
            cells += [interval(row.get("win_rate")), number(row.get("ties"), 2), number(row.get("gain_in_sd"), 2)]
        rows.append(cells)
    betas = ["beta", *(["effective beta"] if rescaled else [])]
    against = ["win rate", "ties", "gain/sd"] if primary else []
    return ["model", *betas, *(NAMES[name] for name in names), *against], rows


def _summary_rows(result: dict[str, Any], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """One line for each arm and setting, over its seeds."""
    rows = []
    first, rescaled = result["rows"][0], _rescaled(result["rows"])
    blank = ["-"] if rescaled else []
    if first["name"] == result["baseline"]:
        rows.append([first["name"], "-", *blank, "1", *(interval(first["metrics"].get(name)) for name in names)])
    for entry in result["summary"]:
        figures = [interval(entry["metrics"].get(name)) for name in names]
        effective = [number(entry.get("effective_beta"), 2)] if rescaled else []
        rows.append([entry["arm"], setting_text(entry["setting"]), *effective, str(entry["seeds"]), *figures])
    for row in result["rows"]:
        if "n" in row:
            figures = [f"<= {row['kl_bound']:.2f}" if n == "kl" else interval(row["metrics"].get(n)) for n in names]
            rows.append([row["name"], "-", *blank, "1", *figures])
    effective = ["effective beta"] if rescaled else []
    return ["arm", "setting", *effective, "seeds", *(NAMES[name] for name in names)], rows


def _cost_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for row in result["rows"]:
        if cost := row.get("cost"):
            counts = (number(int(cost[key])) for key in ("tokens_trained", "tokens_generated", "optimizer_steps"))
            memory = number(cost.get("peak_memory_bytes", 0) / 2**20, 0)
            rows.append(
                (row["name"], number(cost["wall_seconds"], 0), number(cost["flops"] / 1e12, 2), *counts, memory)
            )
    return rows


def print_comparison(result: dict[str, Any]) -> None:
    """The verdict and the tables of a comparison, and where its results are; snapshots are counted, not shown."""
    passed = Counter(row["arm"] for row in result["rows"] if row.get("step") is not None)
    result = result | {"rows": [row for row in result["rows"] if row.get("step") is None]}
    names = [name for name in SHOWN if name in result["rows"][0]["metrics"]]
    summary = result["summary"]
    many = any(entry["seeds"] > 1 for entry in summary) or len({entry["arm"] for entry in summary}) < len(summary)
    columns, rows = _summary_rows(result, names) if many else _model_rows(result, names)
    emit_table(
        f"{result['name']}: {result['prompts']} prompts of the split {result['split']!r} x {result['samples']} samples",
        columns,
        rows,
    )
    if result.get("exact") and not many:
        print_exact(result["exact"] | {"split": result["split"]})
    if not many:
        counted = ("seconds", "TFLOP", "tokens trained", "tokens generated", "optimizer steps", "peak MiB")
        emit_table("cost", ("model", *counted), _cost_rows(result))
    spread = "over seeds" if len(result["seeds"]) > 1 else "clustered by prompt"
    scorers = ", ".join(dict.fromkeys(row["scored_by"] for row in result["rows"] if row.get("scored_by")))
    legend = [f"KL to {result['reference']}, nats per response" if result["reference"] else ""]
    legend += [f"RM score by {scorers}" if scorers else "", f"judge {result['judge']}" if result.get("judge") else ""]
    legend += ["<= marks an upper bound" if any("kl_bound" in row for row in result["rows"]) else ""]
    notes = [
        f"figures: mean with the 95 % interval, {spread}: ± half of it, or [low, high] where it is not symmetric",
        *filter(None, ["; ".join(filter(None, legend))]),
    ]
    if not many:
        notes += [
            f"win rate (a tie is half a win; ties: their share) and gain (in standard deviations of its responses) "
            f"against {result['baseline']}",
            *(["no win rates with one sample a prompt: give --samples 2 or more"] if result["samples"] < 2 else []),
            "cost: the arm's own run and, for PPO, that of its reward model; stages that arms share are on no bill",
        ]
    if _rescaled(result["rows"]):
        notes.append("effective beta: kl_coef x the reward model's calibration slope: KL's price in the labels' reward")
    if passed:
        known = ", ".join(f"{arm} {count}" for arm, count in passed.items())
        notes.append(f"snapshots behind the curves of contrasts, frontier and ranking: {known}; tables: final models")
    emit_lines([*notes, "", *verdict_lines(result["verdict"]), "", f"results  {result['path']}"])
    if result.get("report"):
        emit_lines([f"report   {result['report']}"])


def verdict_lines(verdict: dict[str, Any]) -> list[str]:
    """The verdict as text."""
    lines = verdict["lines"]
    return [
        f"verdict: {verdict['headline']}",
        *(f"  {entry['topic']}: {entry['text']}{'' if entry['certain'] else ' (not certain)'}" for entry in lines),
    ]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(app, "compare", dry_run=True, config="compare", keys=KEYS)(compare)
