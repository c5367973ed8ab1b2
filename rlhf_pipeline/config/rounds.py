"""The later rounds of an experiment: collect from the policy of the round before, train again on all data so far."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.grid import StageSpec
from rlhf_pipeline.config.in_context import name_arm, split_arm
from rlhf_pipeline.config.mentions import set_value
from rlhf_pipeline.config.plan import ExperimentConfig
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.config.yaml import KeyPath
from rlhf_pipeline.errors import Fault

Spec = StageSpec[StageConfig]
ARMS = ("ppo", "dpo")
_ALONE = ("dataset_config", "column_mapping", "dataset_test_name")  # they belong to dataset_name, not to datasets
# A judge that watches a run measures all rounds by the same scale; the start, the reference and the pretraining stream
# stay those of round 1.
_KEPT = ("judge", "model_name_or_path", "ref_model", "ptx_dataset")


@dataclass(frozen=True)
class Rounds:
    """The stages of rounds 2 to n, in running order.

    copied: the stage of round 1 that each of them repeats. later: for each arm, its names in rounds 2 to n.
    """

    stages: tuple[Spec, ...] = ()
    copied: Mapping[str, str] = field(default_factory=dict)
    later: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def enter(self, compare: dict[str, Any]) -> None:
        """Put the later rounds of each arm behind it in the raw `arms` of a comparison that names no later round.

        An arm with demonstrations in its context, `few_shot:dpo`, has those of its policy. The data are part of what is
        compared, unless the comparison says otherwise.
        """
        if not self.later:
            return
        compare.setdefault("allow_other_data", True)
        arms = compare.get("arms")
        named = [split_arm(str(arm)) for arm in arms] if isinstance(arms, list | tuple) else []
        if named and not set(itertools.chain(*self.later.values())) & {name for _, name in named}:
            several = [(method, (name, *self.later.get(name, ()))) for method, name in named]
            compare["arms"] = [name_arm(method, name) for method, names in several for name in names]


def in_round(name: str, number: int, arm: str | None = None) -> str:
    """The name of a stage in a later round: `dpo-2`; for a stage that an arm has to itself, `pairs-dpo-2`."""
    return f"{name}-{number}" if arm is None or arm == name else f"{name}-{arm}-{number}"


def arms_of(config: ExperimentConfig, stages: Sequence[Spec]) -> list[str]:
    """The policies that have rounds: `round_arms`, or all that are trained on data that the experiment collects."""
    if config.round_arms is not None:
        return [spec.name for spec in stages if spec.name in config.round_arms]
    return [spec.name for spec in stages if spec.stage in ARMS and _cone(spec.name, _by_name(stages))]


def rounds_of(config: ExperimentConfig, stages: Sequence[Spec]) -> Rounds:
    """The stages of rounds 2 to n of every arm.

    Round r collects from the arm's policy of round r - 1, with the prompts that follow those of the rounds before. Then
    it repeats the stages between the data and the arm, and the arm itself, on the data of rounds 1 to r (`round_data:
    last`: of round r alone). Each starts from the same model as in round 1, so the reference stays the same. A judge
    that watches PPO stays that of round 1.
    """
    named = _by_name(stages)
    made: list[Spec] = []
    copied: dict[str, str] = {}
    later: dict[str, tuple[str, ...]] = {}
    for arm in arms_of(config, stages):
        cone = _cone(arm, named)
        for number in range(2, config.rounds + 1):
            for name in cone:
                if named[name].stage == "collect":
                    made.append(_collected(named[name], arm, number))
                else:
                    made.append(_trained(config, named[name], cone, named, arm, number))
                copied[made[-1].name] = name
        later[arm] = tuple(in_round(arm, number) for number in range(2, config.rounds + 1))
    return Rounds(tuple(made), copied, later)


def check_rounds(
    config: ExperimentConfig, stages: Sequence[Spec], swept: Mapping[str, str], where: Callable[[KeyPath], str]
) -> Iterator[Fault]:
    """Yield the faults of rounds that the stages do not fit.

    Args:
        swept: a swept key of each swept stage. where: the place of a key path of the experiment.
    """
    named = _by_name(stages)
    for index, name in enumerate(config.round_arms or ()):
        place = where(("round_arms", index))
        fitting = [spec.name for spec in stages if spec.stage in ARMS]
        if name not in named or named[name].stage not in ARMS:
            yield Fault(place, f"{name!r} is not a policy of this experiment", f"one of {', '.join(fitting)}")
        elif not _cone(name, named):
            found = f"{name} does not depend on data that the experiment collects"
            yield Fault(place, found, "a ppo or dpo stage on the data of a collect stage")
    if config.rounds == 1:
        return
    arms = arms_of(config, stages)
    if not arms:
        found = f"found {config.rounds}, but no ppo or dpo stage depends on data that the experiment collects"
        yield Fault(where(("rounds",)), found, "a collect stage whose data a ppo or dpo stage is trained on")
    for arm in arms:
        for name in _cone(arm, named):
            if name in swept:
                found = f"{swept[name]} is swept, but the stage {name} is repeated in rounds"
                yield Fault(where(("rounds",)), found, "a sweep, or rounds", "write the values as separate stages")
            for key in _ALONE if ("dataset_name",) in named[name].links else ():
                if getattr(named[name].config, key, None) is not None:
                    found = f"{name} is repeated in rounds on several sources, which {key} does not apply to"
                    yield Fault(where(("stages", name, key)), found, f"no {key}")
            for number in range(2, config.rounds + 1):
                if (taken := in_round(name, number, arm)) in named:
                    yield Fault(where(("stages", taken)), f"round {number} of {name} has this name", "another name")


def _by_name(stages: Sequence[Spec]) -> dict[str, Spec]:
    return {spec.name: spec for spec in stages}


def _followed(spec: Spec) -> Iterator[tuple[KeyPath, str]]:
    """The links to the stages that a round repeats before this one."""
    return ((path, name) for path, name in spec.links.items() if path[0] not in _KEPT)


def _cone(arm: str, named: Mapping[str, Spec]) -> list[str]:
    """The stages that a round repeats for an arm, in order; none if the arm depends on no collected data.

    They are the collect stages whose data lead to the arm, and all stages on the way from these to it.
    """
    found: dict[str, bool] = {}

    def repeated(name: str) -> bool:
        if name not in found:
            collects = named[name].stage == "collect"
            before = [] if collects else [repeated(one) for _, one in _followed(named[name])]
            found[name] = collects or any(before)
        return found[name]

    return [name for name in named if found.get(name)] if repeated(arm) else []


def _collected(spec: Spec, arm: str, number: int) -> Spec:
    """Round `number` of a collect stage: from the arm's policy of the round before, to further prompts."""
    config = spec.config
    assert isinstance(config, CollectConfig)
    before = arm if number == 2 else in_round(arm, number - 1)
    values = config.model_dump() | {
        "policy": before,
        "output_name": in_round(config.output_name, number, arm),
        "first_record": config.first_record + (number - 1) * config.num,
    }
    links = {path: name for path, name in spec.links.items() if path != ("policy",)} | {("policy",): before}
    return StageSpec(in_round(spec.name, number, arm), spec.stage, CollectConfig.model_validate(values), links)


def _trained(
    config: ExperimentConfig, spec: Spec, cone: Sequence[str], named: Mapping[str, Spec], arm: str, number: int
) -> Spec:
    """Round `number` of a stage that trains: on the data so far, with the models of this round."""
    values: dict[str, Any] = spec.config.model_dump()
    values["output_name"] = in_round(values["output_name"], number, None if spec.name == arm else arm)
    links: dict[KeyPath, str] = {}
    data: dict[KeyPath, str] = {}
    for path, name in spec.links.items():
        if name in cone and path[0] not in _KEPT and named[name].stage == "collect":
            data[path] = name
        elif name in cone and path[0] not in _KEPT:
            links[path] = in_round(name, number, arm)
            set_value(values, path, links[path])
        else:
            links[path] = name
    if data:
        links = {path: name for path, name in links.items() if path[0] != "datasets"}
        entries = _sources(spec, values)
        values |= {"dataset_name": None, "datasets": []}
        for path, entry in entries:
            linked = data.get(path)
            rounds = range(2, number + 1) if config.round_data == "all" else range(number, number + 1)
            names = [] if linked is None else [in_round(linked, one, arm) for one in rounds]
            if linked is None or config.round_data == "all":
                names.insert(0, linked or entry["dataset_name"])
            for name in names:
                if linked is not None or path in spec.links:
                    links[("datasets", len(values["datasets"]), "dataset_name")] = name
                values["datasets"].append(entry | {"dataset_name": name})
    return StageSpec(in_round(spec.name, number, arm), spec.stage, type(spec.config).model_validate(values), links)


def _sources(spec: Spec, values: Mapping[str, Any]) -> list[tuple[KeyPath, dict[str, Any]]]:
    """The sources of a stage as entries of `datasets`, each with the path of its name; one source is used whole."""
    assert isinstance(spec.config, TrainingConfig)
    if spec.config.datasets is None:
        return [(("dataset_name",), {"dataset_name": values["dataset_name"], "fraction": 1.0})]
    return [(("datasets", place, "dataset_name"), dict(one)) for place, one in enumerate(values["datasets"])]
