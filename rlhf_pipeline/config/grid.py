"""A checked experiment, and its runs: its stages for every seed and setting, in running order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf_pipeline.config.base import CommandConfig, spelled
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.mentions import set_reference
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.config.yaml import KeyPath

C = TypeVar("C", bound=CommandConfig, covariant=True)


@dataclass(frozen=True)
class StageSpec(Generic[C]):
    """One stage of an experiment, or its comparison; links in its valid config still name stages.

    `setting` holds the values of the stage's swept keys.
    """

    name: str
    stage: str
    config: C
    links: Mapping[KeyPath, str] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self, outputs: Mapping[str, str]) -> C:
        """Return the config with each linked stage's name replaced by its output's reference.

        Raises:
            KeyError: a linked stage has no output in `outputs`.
        """
        values = self.config.model_dump()
        for path, earlier in self.links.items():
            set_reference(values, path, outputs[earlier])
        return type(self.config).model_validate(values)


@dataclass(frozen=True)
class Experiment:
    """A whole experiment, checked.

    Args:
        stages: each stage with the first seed, at the first point of its own sweep.
        swept: all points of the swept stages. drawn_by_seed: stages that each seed runs again by the config, without
            those that follow from their inputs. pinned: stages whose seed the experiment itself sets.
    """

    name: str
    path: Path
    seeds: tuple[int, ...]
    stages: tuple[StageSpec[StageConfig], ...]
    compare: StageSpec[CompareConfig] | None = None
    notes: tuple[str, ...] = ()
    swept: Mapping[str, tuple[StageSpec[StageConfig], ...]] = field(default_factory=dict)
    drawn_by_seed: tuple[str, ...] = ()
    pinned: frozenset[str] = frozenset()

    def points(self, spec: StageSpec[StageConfig]) -> tuple[StageSpec[StageConfig], ...]:
        """Return a stage at all points of its own sweep, or only itself without a sweep."""
        return self.swept.get(spec.name, (spec,))

    def everything(self) -> Iterator[StageSpec[StageConfig | CompareConfig]]:
        """Yield all stages at all points, and the comparison."""
        for spec in self.stages:
            yield from self.points(spec)
        if self.compare is not None:
            yield self.compare


@dataclass(frozen=True)
class Node:
    """One run of a stage.

    Args:
        spec: the stage with its seed and its swept values; links still name stages.
        seed: its seed among those of the experiment; None if all seeds share the run.
        setting: its own swept values by key, then those of the stages before it as `stage.key`.
        inputs: for each linked stage, the index of its run among all nodes.
    """

    spec: StageSpec[StageConfig]
    seed: int | None
    setting: Mapping[str, Any]
    inputs: Mapping[str, int]

    @property
    def name(self) -> str:
        """The name of its stage."""
        return self.spec.name

    @property
    def label(self) -> str:
        """Its stage, setting and seed, as `ppo beta=0.1 seed 1`; labels are unique within an experiment."""
        words = [self.name, *(f"{key}={_shown(value)}" for key, value in self.setting.items())]
        return " ".join(words if self.seed is None else [*words, f"seed {self.seed}"])

    def resolved(self, outputs: Mapping[int, str]) -> StageConfig:
        """Return the config with links replaced by the references in `outputs`, by index of the node.

        Raises:
            KeyError: a linked node has no output in `outputs`.
        """
        return self.spec.resolved({name: outputs[place] for name, place in self.inputs.items()})


@dataclass(frozen=True, eq=False)
class _Run:
    """A node before its index is known.

    `choices` are those of the node and of all nodes before it: a seed, and the number of a point in each stage's sweep.
    """

    spec: StageSpec[StageConfig]
    choices: Mapping[str, int]
    swept: Mapping[tuple[str, str], Any]
    inputs: tuple[_Run, ...]


_SEED = ""  # no stage has this name


def expand(experiment: Experiment) -> tuple[Node, ...]:
    """Return every run of an experiment, each after its inputs.

    A stage runs once for each seed that resamples the stage or one of its inputs, once for each point of its own sweep,
    and once for each run of its inputs. Inputs that come from one stage come from the same run of this stage. The runs
    that all seeds share are first, then one seed after the other, so an interrupted experiment leaves complete seeds.
    """
    runs: dict[str, list[_Run]] = {}
    for spec in experiment.stages:
        runs[spec.name] = list(_runs_of(experiment, spec, runs))
    ordered = sorted(itertools.chain(*runs.values()), key=lambda run: run.choices.get(_SEED, -1))
    places = {run: place for place, run in enumerate(ordered)}
    return tuple(_node(experiment, run, places) for run in ordered)


def resampled(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Return the stages that each seed runs again, including those that follow from their inputs."""
    return tuple(dict.fromkeys(node.name for node in nodes if node.seed is not None))


def _runs_of(
    experiment: Experiment, spec: StageSpec[StageConfig], runs: Mapping[str, Sequence[_Run]]
) -> Iterator[_Run]:
    """Yield the runs of a stage, given those of all earlier stages; each config with the same inputs once."""
    drawn = spec.name in experiment.drawn_by_seed
    seen = set()
    for number, point in enumerate(experiment.points(spec)):
        parents = dict.fromkeys(point.links.values())
        for inputs in itertools.product(*(runs[name] for name in parents)):
            choices = _agreed(inputs)
            if choices is None:
                continue
            own = {spec.name: number} if point.setting else {}
            values = {(spec.name, key): value for key, value in point.setting.items()}
            for run in inputs:
                values |= {key: value for key, value in run.swept.items() if key not in values}
            # No input has a seed: one run, or one for each seed.
            seeds = [choices[_SEED]] if _SEED in choices else range(len(experiment.seeds)) if drawn else [None]
            for seed in seeds:
                here, config = {**choices, **own}, point.config
                if seed is not None:
                    here[_SEED] = seed
                    if drawn or spec.name not in experiment.pinned:
                        config = config.model_copy(update={"seed": experiment.seeds[seed]})
                key = (config_digest(config), inputs)
                if key not in seen:
                    seen.add(key)
                    yield _Run(replace(point, config=config), here, values, inputs)


def _agreed(inputs: Iterable[_Run]) -> dict[str, int] | None:
    """Return the choices of all inputs together, or None if they contradict each other."""
    merged: dict[str, int] = {}
    for run in inputs:
        if any(merged.get(name, chosen) != chosen for name, chosen in run.choices.items()):
            return None
        merged |= run.choices
    return merged


def _node(experiment: Experiment, run: _Run, places: Mapping[_Run, int]) -> Node:
    name, seed = run.spec.name, run.choices.get(_SEED)
    own = {key: value for (stage, key), value in run.swept.items() if stage == name}
    others = {f"{stage}.{key}": value for (stage, key), value in run.swept.items() if stage != name}
    inputs = {parent.spec.name: places[parent] for parent in run.inputs}
    return Node(run.spec, None if seed is None else experiment.seeds[seed], {**own, **others}, inputs)


def _shown(value: Any) -> str:
    """The shortest text of a value that is different from those of other values."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return spelled(value)
