"""`rlhf sft | train-rm | ppo | dpo` and `rlhf run`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import (
    Common,
    ConfigOption,
    DebugOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    OverridesArgument,
    ResumeOption,
    common_of,
)
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table, flat_metrics


def run_stage(stage: str, config: Path | None, overrides: list[str] | None, common: Common, resume: bool) -> None:
    """Load the config of a stage, run it, and print its result."""
    from rlhf_pipeline.config.load import load_config

    loaded = load_config(stage, config, overrides or [])
    if common.dry_run:
        from rlhf_pipeline.experiment.estimate import estimate_stage

        _print_estimate(estimate_stage(stage, loaded.config, common.home_path) | {"notes": list(loaded.notes)}, common)
        return
    check_models(loaded.config, common.home_path)
    load_libraries()
    from rlhf_pipeline.experiment.run import stage_function

    result = stage_function(stage)(loaded.config, common.home_path, resume=resume, notes=loaded.notes)
    if not result.model:  # one of several processes, and not the one that registers
        return
    if common.json:
        emit_json(result.as_dict())
        return
    rows = [(name, value) for name, value in flat_metrics(result.metrics)]
    emit_table(f"{stage}: {result.model}", ("metric", "value"), rows)
    emit_lines([f"model  {result.model}", f"path   {result.path}", f"run    {result.run}"])


def check_models(config: Any, home: Path) -> None:
    """Check the models that a config names as its stage will, before the libraries are imported.

    Raises:
        UnknownReference, MismatchError, DamagedFile.
    """
    from rlhf_pipeline.config.references import references
    from rlhf_pipeline.registry import Registry, check_role
    from rlhf_pipeline.registry.roles import Role

    registry = Registry(home)
    for reference in references(config):
        if reference.role != "data":
            role: Role = "policy" if reference.role == "policy" else "reward_model"
            check_role(registry.resolve(reference.text), role)


def _print_estimate(estimate: dict, common: Common) -> None:
    if common.json:
        emit_json(estimate)
        return
    emit_table("dry run: nothing was trained", ("what", "value"), flat_metrics(estimate))
    emit_lines([f"note: {note}" for note in estimate.get("notes", ())])


def _command(stage: str, help_text: str):
    def command(
        context: typer.Context,
        overrides: OverridesArgument = None,
        config: ConfigOption = None,
        resume: ResumeOption = True,
        home: HomeOption = None,
        json: JsonOption = False,
        dry_run: DryRunOption = False,
        debug: DebugOption = False,
    ) -> None:
        run_stage(stage, config, overrides, common_of(context, home, json, dry_run, debug), resume)

    command.__doc__ = help_text
    return command


def run(
    context: typer.Context,
    experiment: Annotated[Path, typer.Argument(help="Experiment YAML.", show_default=False)],
    overrides: OverridesArgument = None,
    resume: ResumeOption = True,
    home: HomeOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the stages of an experiment, for every seed and setting, then compare; what is done is skipped."""
    common = common_of(context, home, json, dry_run, debug)
    if common.dry_run:
        from rlhf_pipeline.experiment.estimate import estimate_experiment

        _print_estimate(estimate_experiment(experiment, overrides or [], common.home_path), common)
        return
    from rlhf_pipeline.experiment.run import run_experiment

    again = shlex.join(["rlhf", "run", str(experiment), *(overrides or [])])
    options: dict[str, Any] = {"resume": resume, "command": again, "before_work": load_libraries}
    result = run_experiment(experiment, overrides or [], common.home_path, **options)
    if common.json:
        emit_json(result)
        return
    if result["comparison"] is not None:
        from rlhf_pipeline.cli.compare import print_comparison

        print_comparison(result["comparison"])
        return
    _print_runs(result)


def _print_runs(result: dict[str, Any]) -> None:
    """The models of an experiment without a comparison: a line for each stage, or for each seed and setting of it."""
    if "points" not in result:
        stages = [(name, entry["model"], _state(entry)) for name, entry in result["stages"].items()]
        emit_table(result["experiment"], ("stage", "model", "state"), stages)
        return
    rows = []
    for entry in result["points"]:
        setting = " ".join(f"{key}={value}" for key, value in entry["setting"].items()) or "-"
        rows.append((entry["stage_name"], setting, str(entry["seed"]), entry["model"], _state(entry)))
    emit_table(result["experiment"], ("stage", "setting", "seed", "model", "state"), rows)


def _state(entry: dict[str, Any]) -> str:
    return "done already" if entry["skipped"] else "done"


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("sft")(_command("sft", "Supervised fine-tuning, or pretraining from random weights."))
    app.command("train-rm")(_command("train-rm", "Train a reward model on preference pairs."))
    app.command("ppo")(_command("ppo", "PPO with actor, frozen reference, critic and reward."))
    app.command("dpo")(_command("dpo", "Direct preference optimisation on preference pairs."))
    app.command("run")(run)
