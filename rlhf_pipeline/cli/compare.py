"""`rlhf compare | report`, and the tables of a comparison."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_pipeline.cli.evaluate import MEASURING_KEYS, NAMES, emit_measuring
from rlhf_pipeline.cli.exact import print_exact
from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, JobsOption, Settings, references_and_overrides
from rlhf_pipeline.cli.output import emit, emit_json, emit_lines, emit_table, interval, number
from rlhf_pipeline.errors import UnknownReference, did_you_mean

if TYPE_CHECKING:
    from rlhf_pipeline.report.figures import Row
    from rlhf_pipeline.report.results import Results, Verdict

COMPARE_KEYS = (
    "baseline",
    "name",
    *MEASURING_KEYS,
    "human",
    "snapshots",
    "allow_mismatch",
    "allow_other_data",
    "allow_other_optimum",
)


def compare(
    common: Common,
    settings: Settings,
    references: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REF|KEY=VALUE]...", help="Models; overrides of the config.", show_default=False),
    ] = None,
    jobs: JobsOption = 1,
) -> None:
    """Compare policies on the same prompts with the same random numbers, and write reports/NAME/ with index.html."""
    from rlhf_pipeline.config.compare import CompareConfig

    arms, overrides = references_and_overrides(references or [])
    config = settings.load(overrides, arms=arms or None).of(CompareConfig)
    if common.dry_run:
        if config.human is not None:
            from rlhf_pipeline.labelling.arena import find_project

            find_project(common.home_path, config.human, config.arms)
        emit_measuring(common, config, [*config.arms, *([config.baseline] if config.baseline else [])])
        return
    from rlhf_pipeline.experiment.helpers import helped

    with helped(config, common.home_path, jobs, load_libraries):
        from rlhf_pipeline.compare.run import run_compare

        results = run_compare(config, common.home_path, command=shlex.join(["rlhf", *sys.argv[1:]]))
    if common.json:
        emit_json(results)
    else:
        print_comparison(results)


SHOWN = ("true_reward", "judge", "score", "kl", "well_formed", "ended", "length", "tokens_read")


def setting_text(setting: Mapping[str, Any]) -> str:
    """`beta 0.1`, or a dash."""
    from rlhf_pipeline.config.base import spelled

    texts = (f"{key} {f'{value:g}' if isinstance(value, float) else spelled(value)}" for key, value in setting.items())
    return ", ".join(texts) or "-"


def _rescaled(rows: Sequence[Row]) -> bool:
    """Whether an effective beta is known for any model."""
    return any(row.effective_beta is not None for row in rows)


def _figure(row: Row, name: str) -> str:
    """A figure of a model; the KL of best-of-n is an upper bound."""
    if name == "kl" and row.kl_bound is not None:
        return f"<= {row.kl_bound:.2f}"
    bound = name == "kl" and row.in_context is not None and row.in_context.kl_is_bound
    return f"{'<= ' if bound else ''}{interval(row.metrics.get(name))}"


def _model_rows(results: Results, shown: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """One line for each model."""
    primary, rescaled = results.primary, _rescaled(shown)
    rows = []
    for row in shown:
        cells = [row.name, "-" if row.beta is None else f"{row.beta:g}"]
        if rescaled:
            cells.append(number(row.effective_beta and row.effective_beta.mean, 2))
        cells += [_figure(row, name) for name in names]
        if primary:
            cells += [interval(row.win_rate), number(row.ties, 2), number(row.gain_in_sd, 2)]
        rows.append(cells)
    betas = ["beta", *(["effective beta"] if rescaled else [])]
    against = ["win rate", "ties", "gain/sd"] if primary else []
    return ["model", *betas, *(NAMES[name] for name in names), *against], rows


def _summary_rows(results: Results, shown: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """One line for each arm and setting, over its seeds."""
    rows = []
    first, rescaled = shown[0], _rescaled(shown)
    blank = ["-"] if rescaled else []
    if first.name == results.baseline:
        rows.append([first.name, "-", *blank, "1", *(interval(first.metrics.get(name)) for name in names)])
    for entry in results.summary:
        figures = [interval(entry.metrics.get(name)) for name in names]
        effective = [number(entry.effective_beta, 2)] if rescaled else []
        rows.append([entry.arm, setting_text(entry.setting), *effective, str(entry.seeds), *figures])
    rows += [
        [row.name, "-", *blank, "1", *(_figure(row, name) for name in names)] for row in shown if row.n is not None
    ]
    effective = ["effective beta"] if rescaled else []
    return ["arm", "setting", *effective, "seeds", *(NAMES[name] for name in names)], rows


def _cost_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (
            row.name,
            number(cost.wall_seconds, 0),
            number(cost.flops / 1e12, 2),
            *(number(int(count)) for count in (cost.tokens_trained, cost.tokens_generated, cost.optimizer_steps)),
            number(cost.peak_memory_bytes / 2**20, 0),
        )
        for row in rows
        if (cost := row.cost) is not None
    ]


def print_comparison(results: Results) -> None:
    """Print the tables, the verdict and the paths of a comparison; snapshots are counted, not shown."""
    passed = Counter(row.arm for row in results.rows if row.step is not None)
    shown = [row for row in results.rows if row.step is None]
    names = [name for name in SHOWN if any(name in row.metrics for row in shown)]
    summary = results.summary
    many = any(entry.seeds > 1 for entry in summary) or len({entry.arm for entry in summary}) < len(summary)
    columns, rows = (_summary_rows if many else _model_rows)(results, shown, names)
    title = f"{results.name}: {results.prompts} prompts of the split {results.split!r} x {results.samples} samples"
    emit_table(title, columns, rows)
    if results.exact is not None and not many:
        print_exact(results.exact, results.split)
    if not many:
        counted = ("seconds", "TFLOP", "tokens trained", "tokens generated", "optimizer steps", "peak MiB")
        emit_table("cost", ("model", *counted), _cost_rows(shown))
    spread = "over seeds" if len(results.seeds) > 1 else "clustered by prompt"
    scorers = ", ".join(dict.fromkeys(row.scored_by for row in shown if row.scored_by))
    legend = [f"KL to {results.reference}, nats per response" if results.reference else ""]
    legend += [f"RM score by {scorers}" if scorers else "", f"judge {results.judge}" if results.judge else ""]
    bounds = any(row.kl_bound is not None or (row.in_context and row.in_context.kl_is_bound) for row in shown)
    legend += ["<= marks an upper bound" if bounds else ""]
    notes = [
        f"figures: mean and 95 % interval, {spread}: ± half its width, or [low, high] if it is not symmetric",
        *filter(None, ["; ".join(filter(None, legend))]),
    ]
    few = results.samples < 2 and (results.decoding is None or results.decoding.do_sample)
    if not many:
        notes += [
            "win rate (a tie counts as half a win; ties: share of ties) and gain (in standard deviations of the "
            f"baseline's responses) against {results.baseline}",
            *(["no win rates with one sample per prompt: set --samples to 2 or more"] if few else []),
            "cost: the arm's own run and, for PPO, that of its reward model; shared stages are not counted",
        ]
    if _rescaled(shown):
        notes.append(
            "effective beta: kl_coef x calibration slope of the reward model = beta in units of labels' reward"
        )
    if passed:
        known = ", ".join(f"{arm} {count}" for arm, count in passed.items())
        notes.append(f"snapshots (used for contrasts, frontier and ranking): {known}; the tables show final models")
    emit_lines([*notes, "", *verdict_lines(results.verdict), ""])
    emit_lines([f"results  {results.path}", f"report   {results.report}"])


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict as text."""
    return [
        f"verdict: {verdict.headline}",
        *(f"  {one.topic}: {one.text}{'' if one.certain else ' (not certain)'}" for one in verdict.lines),
    ]


RESULTS = "results.json"


def report(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the comparison.", show_default=False)],
) -> None:
    """Make reports/NAME/index.html again from its results.json."""
    reports = common.home_path / "reports"
    names = sorted(path.parent.name for path in reports.glob(f"*/{RESULTS}"))
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "there is no report yet: run rlhf compare to make one"
        raise UnknownReference(f"no report {name!r} in {reports}; {did_you_mean(name, names) or there}")
    from rlhf_pipeline.report import load, write_report

    path = write_report(load(reports / name / RESULTS), reports / name)
    emit({"path": str(path)}, [f"report  {path}"], json=common.json)
