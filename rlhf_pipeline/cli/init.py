"""`rlhf init`: write an experiment file for the user's own pairs."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common
from rlhf_pipeline.cli.output import emit_json, emit_lines
from rlhf_pipeline.errors import BadInput, DataError

_THERE = "{}: the file exists already; expected a new file: pass --out FILE"


def init(
    common: Common,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Preference pairs or rankings.", show_default=False)],
    model: Annotated[
        str | None, typer.Option("--model", help="Model to start from (default: a small one from scratch).")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA adapters on the model in all stages.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Write a first look of at most about an hour: one seed, few pairs.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="File to write; it must not exist.")] = Path("experiment.yaml"),
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1, max=100)] = 3,
) -> None:
    """Write an experiment for your own pairs: SFT, reward model, judge, PPO and DPO, with lengths from the data."""
    if os.path.lexists(out):
        raise BadInput(_THERE.format(out))
    if not out.parent.is_dir():
        raise BadInput(f"{out}: there is no folder {out.parent}; expected one that exists")
    load_libraries()
    from rlhf_pipeline.config.experiment import load_experiment
    from rlhf_pipeline.experiment.estimate import time_of_experiment
    from rlhf_pipeline.experiment.starter import fitted, plan_starter
    from rlhf_pipeline.experiment.starter_file import Starter, render_starter

    where: dict[str, Path] = {"folder": out.parent.absolute(), "home": common.home_path}
    plan = plan_starter(source, model=model, seeds=seeds, lora=lora, quick=quick, **where)

    def seconds_of(plan: Starter) -> float | None:
        out.write_text(render_starter(plan), encoding="utf-8")
        load_experiment(out, known_models=common.registry.models.names())
        try:
            return time_of_experiment(out, common.home_path)
        except DataError as error:  # the file can be mended by hand
            refused[:] = [f"rlhf run refuses this file as it is: {str(error).splitlines()[0]}"]
            return None

    refused: list[str] = []
    try:
        file = out.open("x", encoding="utf-8")
    except FileExistsError:  # created in the meantime
        raise BadInput(_THERE.format(out)) from None
    file.close()
    try:
        plan, seconds = fitted(plan, seconds_of) if quick else (plan, seconds_of(plan))
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    warnings = [*plan.warnings, *refused]
    if common.json:
        lengths = {"max_prompt_length": plan.max_prompt_length, "response_length": plan.response_length}
        emit_json(
            {"path": str(out), "pairs": plan.pairs, "faulty_rows": plan.faulty, "splits": plan.splits, **lengths}
            | {"warnings": warnings, "estimated_seconds": seconds}
        )
        return
    at = "" if common.home is None else f" --home {shlex.quote(str(common.home))}"
    splits = ", ".join(f"{name} {count:,}" for name, count in plan.splits.items())
    emit_lines(
        [
            f"{out}: {plan.pairs:,} preferences ({splits})",
            f"prompts of up to {plan.max_prompt_length} tokens, responses of up to {plan.response_length}",
            *(f"note: {warning}" for warning in warnings),
            *([] if seconds is None else [_time(seconds, quick)]),
            f"next: rlhf run {shlex.quote(str(out))} --dry-run{at}",
        ]
    )


def _time(seconds: float, quick: bool) -> str:
    """A line on the time that the experiment takes."""
    from rlhf_pipeline.experiment.machine import FACTOR
    from rlhf_pipeline.experiment.progress import spoken

    told = f"about {spoken(seconds)} on this machine, up to a factor of {FACTOR} either way"
    if quick:
        return f"{told}: a first look, which cannot tell which method is better (see the file)"
    return told if seconds <= 3600 else f"{told}; rlhf init --quick writes a first look of about an hour"
