"""A checked experiment: its stages with valid configs; links in the configs still name stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf_pipeline.config.base import CommandConfig
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.mentions import set_value
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
            set_value(values, path, outputs[earlier])
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
