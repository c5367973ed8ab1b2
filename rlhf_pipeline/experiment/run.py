"""Run an experiment: its stages for every seed and setting (finished runs are skipped), then the comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_pipeline.compare.points import Point, points_of
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import Experiment, Node, StageSpec, expand, resampled
from rlhf_pipeline.config.mentions import Mention, functions, mentions
from rlhf_pipeline.config.reward_names import load_function
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.splits import in_split
from rlhf_pipeline.errors import BadInput, ConfigError, Fault, Interrupted
from rlhf_pipeline.experiment.done import (
    RESULTS,
    compared_already,
    comparison_inputs,
    find_done,
    note_comparison,
    output_of,
    survey,
)
from rlhf_pipeline.experiment.functions import stage_function
from rlhf_pipeline.experiment.helpers import Helpers
from rlhf_pipeline.experiment.jobs import reserved_number, run_at_once, team
from rlhf_pipeline.experiment.launch import run_in_processes
from rlhf_pipeline.experiment.progress import Outcome, progress_line
from rlhf_pipeline.experiment.workers import Team, hired
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import check_role
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report import Results
from rlhf_pipeline.training.run_directory import finish_run, left_open
from rlhf_pipeline.training.tracking import console


def checked(experiment: Experiment, nodes: Sequence[Node], registry: Registry) -> list[Resolved | None]:
    """Check every model and data source that exists already, before the first stage runs.

    Returns:
        The version that each node has already made; None if there is none yet.

    Raises:
        BadInput: lists all faults of all stages.
    """
    faults = _input_faults(experiment, registry)
    done: list[Resolved | None] = [None] * len(nodes) if faults else survey(nodes, registry)
    waiting = [node.spec for node, found in zip(nodes, done, strict=True) if found is None]
    faults += _new_model_faults(waiting)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return done


def _new_model_faults(specs: Sequence[StageSpec]) -> list[Fault]:
    """The faults of models from random weights; this imports transformers to read their configs."""
    faults: list[Fault] = []
    for spec in specs:
        if (described := getattr(spec.config, "model_init", None)) is not None:
            from rlhf_pipeline.models.loading import new_config

            try:
                new_config(described, dropout=spec.config.dropout)
            except ConfigError as error:
                faults += [replace(fault, where=f"{spec.name}.{fault.where}") for fault in error.faults]
    return faults


def _input_faults(experiment: Experiment, registry: Registry) -> list[Fault]:
    """The faults of the functions, models and data that an experiment names."""
    faults: list[Fault] = []
    checked: dict[tuple[Any, ...], str | None] = {}  # each source is read once, even if many points name it
    for spec in experiment.everything():
        for source in functions(spec.config):
            try:
                load_function(source)
            except ConfigError as error:
                faults += error.faults
        config = spec.config
        for mention in mentions(config):
            if mention.path in spec.links:
                continue
            trains = isinstance(config, TrainingConfig) and mention.path == ("dataset_name",)
            split = config.dataset_train_split if isinstance(config, TrainingConfig) and trains else None
            key = (replace(mention, path=()), config.skip_bad_rows, split, *config.split_fractions.items())
            if key not in checked:
                checked[key] = _problem(mention, registry, config, split)
            if (problem := checked[key]) is not None:
                faults.append(Fault(f"{spec.name}.{'.'.join(map(str, mention.path))}", problem))
        if isinstance(config, CompareConfig) and config.human is not None:
            from rlhf_pipeline.labelling.arena import find_project

            try:
                find_project(registry.home, config.human)
            except ConfigError as error:
                faults += [replace(fault, where=f"{spec.name}.{fault.where}") for fault in error.faults]
    return faults


def _problem(
    mention: Mention, registry: Registry, config: StageConfig | CompareConfig, split: str | None
) -> str | None:
    """The fault of a mention in a config, or None; data without rows in the training split are also a fault."""
    try:
        if mention.role == "data":
            found = read_records(
                mention.text,
                mention.part,
                columns=mention.columns,
                home=registry.home,
                skip_bad_rows=config.skip_bad_rows,
                splits=None if split is None else {split},
            )
            if split is not None:
                in_split(found.records, split, config.split_fractions, found.source)
        else:
            check_role(registry.resolve(mention.text), "policy" if mention.role == "policy" else "reward_model")
    except BadInput as error:
        return str(error)
    return None


def run_experiment(
    path: Mapping[str, Any] | Path,
    overrides: Sequence[str],
    home: Path,
    *,
    resume: bool = True,
    quiet: bool = False,
    jobs: int = 1,
    executor: str = "local",
    processes: int = 1,
    command: str | None = None,
    before_work: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the unfinished parts of an experiment and compare; returns the outcome of each stage and the comparison.

    Args:
        path: the experiment's file, or its content. command: the command that reproduces this, for the report.
        jobs: the number of processes that run stages and measure for the comparison; 1: this process does it all.
        executor: local, or ray: each stage runs on a node of a Ray cluster; this process compares.
        processes: how many train each model together; 1: one. Data are collected and models compared in this process.
        before_work: called before this process runs a stage or the comparison; not called if everything is done.
    """

    def say(text: str) -> None:
        if not quiet:
            console.print(text, markup=False, style="bold")

    # 1. Check everything, and find what is done.
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        found = f"found a launcher of {count} processes (WORLD_SIZE), expected one process"
        raise BadInput(f"{found}; use rlhf run FILE --num-processes {count}, without torchrun or accelerate launch")
    if processes > 1 and (jobs > 1 or executor != "local"):
        found = f"--jobs {jobs}" if executor == "local" else f"--executor {executor}"
        raise BadInput(f"found {found} with --num-processes {processes}, expected one of them; leave the other out")
    registry = Registry(home)
    experiment = load_experiment(path, overrides, known_models=registry.models.names())
    for note in experiment.notes:
        say(f"note: {note}")
    nodes = expand(experiment)
    done = checked(experiment, nodes, registry)
    for node, version in zip(nodes, done, strict=True):
        _close(version, node.spec.config, registry)
    drawn = resampled(nodes)
    for line in _about(experiment, nodes, drawn):
        say(line)

    # 2. Run the rest, and compare.
    logs = registry.home.absolute() / "logs" / experiment.name
    local = executor == "local"
    with ExitStack() as stack:
        crew: Team | None = None
        if (jobs > 1 and local) or not (local or all(done)):
            crew = stack.enter_context(hired(team(executor, jobs, registry.home)))
        helpers = Helpers(crew, registry.home.absolute(), logs) if crew is not None and local else None
        if crew is not None and not all(done):
            idle = partial(_begin_comparison, experiment.compare, registry, helpers, before_work)
            options: dict[str, Any] = {"logs": logs, "resume": resume, "say": say, "when_idle": idle}
            outcomes = run_at_once(nodes, done, registry, crew, **options)
        else:
            outcomes = _in_order(nodes, done, registry, say, before_work, processes, resume=resume, quiet=quiet)
        options = {"quiet": quiet, "command": command}
        compared = _compared(experiment, outcomes, registry, say, drawn, before_work, helpers, **options)

    # 3. The result: the entry of a stage is that of its first node.
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        first.setdefault(outcome.node.name, outcome)
    several = len(experiment.seeds) > 1 or bool(experiment.swept)
    return {
        "experiment": experiment.name,
        "stages": {
            name: {"stage": outcome.node.spec.stage, "model": outcome.model, "skipped": outcome.skipped}
            for name, outcome in first.items()
        },
        **({"points": [o.as_point() for o in outcomes], "resampled": list(drawn)} if several else {}),
        "comparison": compared,
    }


def _close(found: Resolved | None, config: StageConfig, registry: Registry) -> None:
    """Do what is left of the run of a version, if it was killed between registering the version and ending."""
    if found is None or found.manifest is None:
        return
    if (directory := left_open(registry.home, found.manifest.run)) is None:
        return
    if isinstance(config, TrainingConfig) and config.output_dir is not None:
        registry.export(found.label, config.output_dir, replace=True)
    finish_run(directory, found.label)


def _in_order(
    nodes: Sequence[Node],
    done: Sequence[Resolved | None],
    registry: Registry,
    say: Callable[[str], None],
    before_work: Callable[[], None],
    processes: int,
    **options: Any,
) -> list[Outcome]:
    """Run the nodes that are not done, one after another; several processes train, this one does the rest."""
    outputs: dict[int, str] = {}
    outcomes: list[Outcome] = []
    for place, node in enumerate(nodes):
        config = node.resolved(outputs)
        found = done[place] or find_done(config, registry)  # its inputs were just made: it may be done
        if found is not None:
            cost = found.manifest.cost if found.manifest else {}
            outcomes.append(Outcome(node, found.label, True, cost.get("wall_seconds")))
            say(f"[{place + 1}/{len(nodes)}] {node.label}: already done, {found.label}")
        else:
            waiting = [later.name for later, ready in zip(nodes[place:], done[place:], strict=True) if ready is None]
            ended = [(outcome.node.name, outcome.skipped, outcome.seconds) for outcome in outcomes]
            say(f"[{place + 1}/{len(nodes)}] {node.label} ({progress_line(waiting, ended)})")
            later = sum(ready is not None for ready in done[place + 1 :])
            rest = f"of {len(nodes)} are done; the same command continues from here"
            try:
                options["number"] = reserved_number(config, registry)  # by an earlier run of several at a time
                if processes > 1 and isinstance(config, TrainingConfig):
                    result = run_in_processes(node.spec.stage, config, registry.home, count=processes, **options)
                else:
                    before_work()
                    result = stage_function(node.spec.stage)(config, registry.home, **options)
            except Interrupted:
                say(f"stopped in {node.label}: {place + later} {rest}")
                raise
            if (signalled := result.stopped_by) is not None:
                raise Interrupted(
                    f"stopped by signal {signalled} after {node.label} was done: {place + 1 + later} {rest}", signalled
                )
            outcomes.append(Outcome(node, result.model, False, result.cost.get("wall_seconds")))
        outputs[place] = output_of(node, outcomes[-1].model)
    return outcomes


def _about(experiment: Experiment, nodes: Sequence[Node], drawn: Sequence[str]) -> list[str]:
    """Describe the seeds and settings of an experiment; empty for a single run of each stage."""
    lines = []
    if len(experiment.seeds) > 1:
        shared = [spec.name for spec in experiment.stages if spec.name not in drawn]
        seeds = ", ".join(map(str, experiment.seeds))
        once = f"; run once: {', '.join(shared)}" if shared else ""
        lines.append(f"seeds {seeds}: each runs {', '.join(drawn) or 'nothing'} again{once}")
    for name, points in experiment.swept.items():
        count = len(points)
        lines.append(f"sweep of {name}: {count} setting{'s' if count > 1 else ''} of {', '.join(points[0].setting)}")
    return [*lines, f"{len(nodes)} runs in all"] if lines else []


def _compared(
    experiment: Experiment,
    outcomes: Sequence[Outcome],
    registry: Registry,
    say: Callable[[str], None],
    drawn: Sequence[str],
    before_work: Callable[[], None],
    helpers: Helpers | None,
    **options: Any,
) -> Results | None:
    """Make the experiment's comparison, or return the results that it has made already."""
    if experiment.compare is None:
        return None
    made = [(outcome.node, outcome.model) for outcome in outcomes]
    config, points = _comparison(experiment.compare, made, registry)
    report = registry.home / "reports" / config.name
    inputs = comparison_inputs(config, points, drawn, registry)
    if inputs is not None and (results := compared_already(report, inputs)) is not None:
        say(f"already compared: {report / RESULTS} (remove the folder to compare again)")
        return results
    against = f" with {config.baseline}" if config.baseline else ""
    say(f"comparing {', '.join(point.model for point in points)}{against}")
    if helpers is None:
        before_work()
    with nullcontext() if helpers is None else helpers.beside(config, points, before_work):
        from rlhf_pipeline.compare.run import run_compare

        results = run_compare(config, registry.home, points=points, resampled=drawn, **options)
    if inputs is not None:
        note_comparison(report, inputs)
    return results


def _begin_comparison(
    compare: StageSpec[CompareConfig] | None,
    registry: Registry,
    helpers: Helpers | None,
    before_work: Callable[[], None],
    outcomes: Sequence[Outcome],
) -> None:
    """While the last runs go on: have free workers measure what is done, and get ready to compare."""
    if compare is None:
        return
    made = [(outcome.node, outcome.model) for outcome in outcomes]
    if helpers is not None and set(compare.links.values()) <= {node.name for node, _ in made}:
        helpers.ask(*_comparison(compare, made, registry), helpers.crew.size)
    before_work()


def _comparison(
    compare: StageSpec[CompareConfig], made: Sequence[tuple[Node, str]], registry: Registry
) -> tuple[CompareConfig, tuple[Point, ...]]:
    """The config of a comparison, which names the first node of each stage, and its points, which are all nodes."""
    models: dict[str, str] = {}
    for node, model in made:
        models.setdefault(node.name, output_of(node, model))
    return compare.resolved(models), points_of(compare, made, registry)


def is_compared(
    experiment: Experiment, nodes: Sequence[Node], done: Sequence[Resolved | None], registry: Registry
) -> bool:
    """Whether the comparison of an experiment has been made from these models."""
    made = [(node, found.label) for node, found in zip(nodes, done, strict=True) if found is not None]
    if experiment.compare is None or len(made) < len(nodes):
        return False
    config, points = _comparison(experiment.compare, made, registry)
    inputs = comparison_inputs(config, points, resampled(nodes), registry)
    return inputs is not None and compared_already(registry.home / "reports" / config.name, inputs) is not None
