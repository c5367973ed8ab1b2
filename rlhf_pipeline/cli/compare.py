"""`rlhf compare`: the command, and the tables of a comparison."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.evaluate import (
    NAMES,
    BestOfOption,
    JudgeOption,
    MaxNewTokensOption,
    MaxPromptsOption,
    PromptsOption,
    ReferenceOption,
    RewardModelOption,
    SamplesOption,
    SeedOption,
    SplitOption,
    TemperatureOption,
    TrueRewardOption,
    dry_run_of,
    given,
)
from rlhf_pipeline.cli.exact_table import print_exact
from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    common_of,
    references_and_overrides,
)
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table, interval, number


def compare(
    context: typer.Context,
    references: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REF|KEY=VALUE]...", help="Models; overrides of the config.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Model to set the arms against.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the report.")] = None,
    split: SplitOption = None,
    prompts: PromptsOption = None,
    max_prompts: MaxPromptsOption = None,
    samples: SamplesOption = None,
    temperature: TemperatureOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    seed: SeedOption = None,
    reward_model: RewardModelOption = None,
    reference: ReferenceOption = None,
    best_of: BestOfOption = None,
    judge: JudgeOption = None,
    true_reward: TrueRewardOption = None,
    snapshots: Annotated[
        bool, typer.Option("--snapshots", help="Add the snapshots of every arm's runs to its curve.")
    ] = False,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare arms that differ in more than their training; say so.")
    ] = False,
    home: HomeOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare policies on the same prompts with the same random numbers; writes reports/NAME/ with index.html."""
    common = common_of(context, home, json, dry_run, debug)
    from rlhf_pipeline.config.load import load_config

    arms, overrides = references_and_overrides(references or [])
    options = given(
        baseline=baseline,
        name=name,
        split=split,
        prompts=prompts,
        max_prompts=max_prompts,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        reward_model=reward_model,
        reference=reference,
        best_of=best_of,
        judge=judge,
        true_reward=true_reward,
        snapshots=snapshots or None,
        allow_mismatch=allow_mismatch or None,
        arms=arms or None,
    )
    loaded = load_config("compare", config, overrides, extra=options)
    if common.dry_run:
        models = [*loaded.config.arms, *([loaded.config.baseline] if loaded.config.baseline else [])]
        dry_run_of("compare", loaded.config, models, common)
        return
    load_libraries()
    from rlhf_pipeline.experiment.compare import run_compare

    result = run_compare(loaded.config, common.home_path, command=shlex.join(["rlhf", *sys.argv[1:]]))
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


def _model_rows(result: dict[str, Any], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """One line for each model."""
    primary = result["primary"]
    rows = []
    for row in result["rows"]:
        cells = [row["name"], "-" if row.get("beta") is None else f"{row['beta']:g}"]
        for name in names:
            bound = name == "kl" and "kl_bound" in row
            cells.append(f"<= {row['kl_bound']:.2f}" if bound else interval(row["metrics"].get(name)))
        if primary:
            cells += [interval(row.get("win_rate")), number(row.get("ties"), 2), number(row.get("gain_in_sd"), 2)]
        rows.append(cells)
    against = ["win rate", "ties", "gain/sd"] if primary else []
    return ["model", "beta", *(NAMES[name] for name in names), *against], rows


def _summary_rows(result: dict[str, Any], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """One line for each arm and setting, over its seeds."""
    rows = []
    first = result["rows"][0]
    if first["name"] == result["baseline"]:
        rows.append([first["name"], "-", "1", *(interval(first["metrics"].get(name)) for name in names)])
    for entry in result["summary"]:
        figures = [interval(entry["metrics"].get(name)) for name in names]
        rows.append([entry["arm"], setting_text(entry["setting"]), str(entry["seeds"]), *figures])
    for row in result["rows"]:
        if "n" in row:
            figures = [f"<= {row['kl_bound']:.2f}" if n == "kl" else interval(row["metrics"].get(n)) for n in names]
            rows.append([row["name"], "-", "1", *figures])
    return ["arm", "setting", "seeds", *(NAMES[name] for name in names)], rows


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
    app.command("compare")(compare)
