"""Run an experiment: its stages in order, what is done skipped, then the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.experiment import Experiment, StageSpec, load_experiment
from rlhf_pipeline.config.references import references
from rlhf_pipeline.data.load import read_records, records_digest
from rlhf_pipeline.data.sources import part_of
from rlhf_pipeline.data.splits import assign_splits, in_split
from rlhf_pipeline.errors import BadInput, ConfigError, Fault
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import check_role
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.rewards import is_function_name, load_function, names_a_model
from rlhf_pipeline.stages.common import StageResult
from rlhf_pipeline.training.tracking import console

REGISTRY_STAGE = {"sft": "sft", "train-rm": "reward", "ppo": "ppo", "dpo": "dpo", "collect": "collect"}


def stage_function(stage: str) -> Callable[..., StageResult]:
    """The function that runs a stage, by its command name; imported when asked for."""
    from rlhf_pipeline.stages import collect, dpo, ppo, reward, sft

    return {
        "sft": sft.run_sft,
        "train-rm": reward.run_reward,
        "ppo": ppo.run_ppo,
        "dpo": dpo.run_dpo,
        "collect": collect.run_collect,
    }[stage]


def expected_parents(stage: str, config: Any, registry: Registry) -> dict[str, str | None]:
    """Digests of the models that a stage with this config would come from, by role."""

    def digest(text: str) -> str | None:
        return registry.resolve(text).digest

    if stage == "collect":
        parents = {"policy": digest(config.policy)}
        return parents | ({"judge": digest(config.judge)} if names_a_model(config.judge) else {})
    if config.model_name_or_path is None:
        return {}
    parents = {"base": digest(config.model_name_or_path)}
    if stage == "dpo":
        parents["reference"] = digest(config.ref_model or config.model_name_or_path)
    if stage == "ppo":
        parents["reference"] = parents["base"]
        for number, source in enumerate(r.source for r in config.rewards if names_a_model(r.source)):
            parents["reward_model" if number == 0 else f"reward_model_{number + 1}"] = digest(source)
    return parents


def expected_data(stage: str, config: Any, home: Path) -> list[str]:
    """Digests of the data that a stage with this config would train on (or take prompts from)."""
    if stage == "collect":
        part = part_of(config.prompts, config.dataset_config, "prompt")
        found = read_records(config.prompts, config=part, home=home, skip_bad_rows=config.skip_bad_rows)
        fractions = config.split_fractions
        splits: Sequence[str] = config.splits or sorted(set(assign_splits(found.records, fractions, found.source)))
        return [records_digest(in_split(found.records, split, fractions, found.source)) for split in splits]
    digests = []
    for name, part in _sources(stage, config):
        found = read_records(name, config=part, home=home, skip_bad_rows=config.skip_bad_rows)
        chosen = in_split(found.records, config.dataset_train_split, config.split_fractions, found.source)
        digests.append(records_digest(chosen))
    return digests


def _sources(stage: str, config: Any) -> list[tuple[str, str | None]]:
    if config.datasets:
        return [(entry.dataset_name, entry.dataset_config) for entry in config.datasets]
    kind = "prompt" if config.reads_prompts else "row"
    return [(config.dataset_name, part_of(config.dataset_name, config.dataset_config, kind))]


def find_done(stage: str, config: Any, registry: Registry) -> Resolved | None:
    """The latest version that this very config has made from the same parents and data, if there is one."""
    digest = config_digest(config)
    shelf = registry.data if stage == "collect" else registry.models
    if not any(item.manifest is not None and item.manifest.config_digest == digest for item in shelf.all()):
        return None  # the cheap answer first: reading the data takes a moment
    return registry.find(
        REGISTRY_STAGE[stage],
        digest,
        expected_parents(stage, config, registry),
        expected_data(stage, config, registry.home),
        name=config.output_name,
    )


def check_inputs(experiment: Experiment, registry: Registry) -> None:
    """Check every model and data source that exists already, before the first stage runs.

    Raises:
        BadInput: with all faults of all stages.
    """
    faults: list[Fault] = []
    for spec in (*experiment.stages, *([experiment.compare] if experiment.compare else [])):
        named = [reward.source for reward in getattr(spec.config, "rewards", ())] + [getattr(spec.config, "judge", "")]
        for source in named:
            if is_function_name(source):
                try:
                    load_function(source)
                except ConfigError as error:
                    faults += error.faults
        handed_over = set(spec.links)
        for reference in references(spec.config):
            if reference.path in handed_over:
                continue
            where = f"{spec.name}.{'.'.join(map(str, reference.path))}"
            try:
                if reference.role == "data":
                    read_records(
                        reference.text,
                        config=getattr(spec.config, "dataset_config", None),
                        home=registry.home,
                        skip_bad_rows=getattr(spec.config, "skip_bad_rows", False),
                    )
                else:
                    check_role(
                        registry.resolve(reference.text),
                        "policy" if reference.role == "policy" else "reward_model",
                    )
            except BadInput as error:
                faults.append(Fault(where, str(error)))
    if faults:
        raise ConfigError(faults)


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage of an experiment."""

    name: str
    stage: str
    model: str
    skipped: bool
    metrics: Mapping[str, Any]
    cost: Mapping[str, Any]


def run_experiment(
    path: Path, overrides: Sequence[str], home: Path, *, resume: bool = True, quiet: bool = False
) -> dict[str, Any]:
    """Run what is missing of an experiment and compare; returns the outcome of each stage and the comparison."""

    def say(text: str) -> None:
        if not quiet:
            console.print(text, markup=False, style="bold")

    registry = Registry(home)
    experiment = load_experiment(path, overrides, known_models=registry.models.names())
    for note in experiment.notes:
        say(f"note: {note}")
    check_inputs(experiment, registry)
    outputs: dict[str, str] = {}
    outcomes: list[StageOutcome] = []
    count = len(experiment.stages)
    for number, spec in enumerate(experiment.stages, start=1):
        outcome = _run_stage(spec, outputs, registry, f"[{number}/{count}]", say, resume=resume, quiet=quiet)
        outputs[spec.name] = f"collected:{outcome.model}" if spec.stage == "collect" else outcome.model
        outcomes.append(outcome)
    comparison = None
    if experiment.compare is not None:
        from rlhf_pipeline.experiment.compare import run_compare

        config = experiment.compare.resolved(outputs)
        say(f"comparing {', '.join(config.arms)}" + (f" with {config.baseline}" if config.baseline else ""))
        comparison = run_compare(config, home, quiet=quiet)
    return {
        "experiment": experiment.name,
        "stages": {o.name: {"stage": o.stage, "model": o.model, "skipped": o.skipped} for o in outcomes},
        "comparison": comparison,
    }


def _run_stage(
    spec: StageSpec,
    outputs: Mapping[str, str],
    registry: Registry,
    place: str,
    say: Callable[[str], None],
    *,
    resume: bool,
    quiet: bool,
) -> StageOutcome:
    config = spec.resolved(outputs)
    done = find_done(spec.stage, config, registry)
    if done is not None and done.manifest is not None:
        say(f"{place} {spec.name}: done already, {done.label}")
        return StageOutcome(spec.name, spec.stage, done.label, True, done.manifest.metrics, done.manifest.cost)
    say(f"{place} {spec.name}: {spec.stage}")
    result = stage_function(spec.stage)(config, registry.home, resume=resume, quiet=quiet)
    return StageOutcome(spec.name, spec.stage, result.model, False, result.metrics, result.cost)
