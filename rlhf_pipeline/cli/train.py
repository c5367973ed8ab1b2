"""`rlhf sft | train-rm | ppo | dpo` and `rlhf run`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_pipeline.api import check_models
from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import (
    Common,
    ExecutorOption,
    JobsOption,
    OverridesArgument,
    ProcessesOption,
    ResumeOption,
    Settings,
)
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_plan, emit_table, flat_metrics, number

NOT_TRAINED = "nothing was trained"


def train(
    common: Common,
    settings: Settings,
    overrides: OverridesArgument = None,
    resume: ResumeOption = True,
    processes: ProcessesOption = 1,
) -> None:
    """Train a model and register it."""
    from rlhf_pipeline.config.training import TrainingConfig

    loaded = settings.load(overrides)
    config = loaded.of(TrainingConfig)
    if common.dry_run:
        from rlhf_pipeline.experiment.estimate import estimate_stage

        plan = estimate_stage(config, common.home_path, processes=processes) | {"notes": list(loaded.notes)}
        emit_plan(plan, NOT_TRAINED, json=common.json)
        return
    check_models(config, common.registry)
    options: dict[str, Any] = {"resume": resume, "notes": loaded.notes}
    if processes > 1:
        from rlhf_pipeline.experiment.launch import run_in_processes

        options |= {"count": processes, "debug": common.debug}
        result = run_in_processes(settings.stage, config, common.home_path, **options)
    else:
        load_libraries()
        from rlhf_pipeline.experiment.functions import stage_function

        result = stage_function(settings.stage)(config, common.home_path, **options)
    if not result.model:  # a process that does not register the model
        return
    if common.json:
        emit_json(result.as_dict())
        return
    emit_table(f"{settings.stage}: {result.model}", ("metric", "value"), flat_metrics(result.metrics))
    emit_lines([f"model  {result.model}", f"path   {result.path}", f"run    {result.run}"])


def run(
    common: Common,
    experiment: Annotated[Path, typer.Argument(help="Experiment YAML.", show_default=False)],
    overrides: OverridesArgument = None,
    resume: ResumeOption = True,
    jobs: JobsOption = 1,
    executor: ExecutorOption = "local",
    processes: ProcessesOption = 1,
) -> None:
    """Run the stages of an experiment, for every seed and setting, then compare; finished runs are skipped."""
    options: dict[str, Any] = {"jobs": jobs, "processes": processes}
    if common.dry_run:
        from rlhf_pipeline.experiment.estimate import estimate_experiment

        plan = estimate_experiment(experiment, overrides or [], common.home_path, **options)
        if not common.json:
            _print_estimates(plan)
            plan = {key: value for key, value in plan.items() if key not in ("stages", "estimates", "machine")}
        emit_plan(plan, NOT_TRAINED, json=common.json)
        return
    from rlhf_pipeline.experiment.run import run_experiment

    several = ["--num-processes", str(processes)] if processes > 1 else []
    again = shlex.join(["rlhf", "run", str(experiment), *(overrides or []), *several])
    options |= {"resume": resume, "executor": executor, "command": again, "before_work": load_libraries}
    result = run_experiment(experiment, overrides or [], common.home_path, **options)
    if common.json:
        emit_json(result)
        return
    if result["comparison"] is not None:
        from rlhf_pipeline.cli.compare import print_comparison

        print_comparison(result["comparison"])
        return
    _print_runs(result)


def _print_estimates(plan: Mapping[str, Any]) -> None:
    """Print what the runs of an experiment and its comparison will take: one line for each."""
    from rlhf_pipeline.experiment.progress import spoken

    names = ("optimizer_steps", "tokens_trained", "tokens_sampled")
    rows = []
    for name in dict.fromkeys([*plan["stages"], *plan["estimates"]]):
        found = plan["estimates"].get(name, {})
        counted = next((found[key] for key in ("rows", "prompts", "records") if key in found), None)
        amounts = (counted, found.get("episodes"), *(found.get(key) for key in names))
        tflop = found.get("tflop")
        time = "-" if "seconds" not in found else spoken(found["seconds"])
        state = plan["stages"].get(name, "to run")
        rows.append((name, state, *map(number, amounts), "-" if tflop is None else f"{tflop:,.3g}", time))
    columns = ("run", "state", "rows", "episodes", "steps", "tokens trained", "tokens sampled", "TFLOP", "time")
    emit_table("runs", columns, rows)


def _print_runs(result: dict[str, Any]) -> None:
    """Print the models of an experiment without a comparison: one line for each stage, or for each seed and setting."""
    if "points" not in result:
        stages = [(name, entry["model"], _state(entry)) for name, entry in result["stages"].items()]
        emit_table(result["experiment"], ("stage", "model", "state"), stages)
        return
    from rlhf_pipeline.config.base import spelled

    rows = []
    for entry in result["points"]:
        setting = " ".join(f"{key}={spelled(value)}" for key, value in entry["setting"].items()) or "-"
        rows.append((entry["stage_name"], setting, str(entry["seed"]), entry["model"], _state(entry)))
    emit_table(result["experiment"], ("stage", "setting", "seed", "model", "state"), rows)


def _state(entry: dict[str, Any]) -> str:
    return "already done" if entry["skipped"] else "done"


STAGES = {
    "sft": "Supervised fine-tuning, or pretraining from random weights.",
    "train-rm": "Train a reward model on preference pairs.",
    "ppo": "PPO, A2C, RLOO or GRPO against a reward, with a frozen reference.",
    "dpo": "Direct preference optimisation on preference pairs.",
}
