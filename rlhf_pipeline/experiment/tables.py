"""Points as tables: an arm's figures by setting, seed and prompt, so that arms can be paired by seed and prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_pipeline.evaluation.frontier import Curve, choose
from rlhf_pipeline.experiment.exact import beta_of
from rlhf_pipeline.experiment.rows import Measured


class Setting(tuple):
    """The swept values of a point as a key: (name, value as JSON) pairs; `values` are the values themselves."""

    values: dict[str, Any]


def setting_key(setting: Mapping[str, Any]) -> Setting:
    """A setting as a key, whatever its values are."""
    key = Setting((name, json.dumps(value, sort_keys=True, default=str)) for name, value in sorted(setting.items()))
    key.values = dict(setting)
    return key


@dataclass(frozen=True)
class Arm:
    """The measured points of one arm, by setting and seed."""

    name: str
    points: dict[tuple, dict[int | None, Measured]]

    @property
    def settings(self) -> list[tuple]:
        """In the order in which they were given."""
        return list(self.points)

    def seeds(self, setting: tuple) -> list[int | None]:
        return list(self.points[setting])

    def beta(self, setting: tuple) -> float | None:
        """The price of KL at a setting, the same for all its seeds."""
        return beta_of(next(iter(self.points[setting].values())).model)

    def samples(self, setting: tuple, seeds: Sequence[int | None], figure: str) -> np.ndarray:
        """(S, P, N) a figure of every response."""
        rows = [self.points[setting][seed].test for seed in seeds]
        return np.stack([row.values[figure].reshape(len(row.examples), -1) for row in rows])

    def values(self, setting: tuple, seeds: Sequence[int | None], figure: str, split: str = "test") -> np.ndarray:
        """(S, P) means over the samples of each prompt."""
        return np.stack([self.points[setting][seed].values(figure, split) for seed in seeds])

    def stacked(
        self, seeds: Sequence[int | None], figure: str, split: str = "test", settings: Sequence[tuple] | None = None
    ) -> np.ndarray:
        """(S, G, P) of some settings, by default of all."""
        chosen = self.settings if settings is None else settings
        return np.stack([self.values(setting, seeds, figure, split) for setting in chosen], 1)

    @property
    def validated(self) -> bool:
        """Whether every point was measured on validation prompts too."""
        return all(point.validation is not None for points in self.points.values() for point in points.values())

    def envelope(self, seeds: Sequence[int | None], chooser: str | None) -> list[tuple]:
        """The settings that no other one beats in KL and in the chooser's figure, on the validation prompts.

        The chooser is what a user would have (a judge, a reward model), not the truth that is then shown on test
        prompts. Without validation figures these are all settings.
        """
        if chooser is None or not self.validated or len(self.settings) < 2:
            return self.settings
        kl, reward = (self.stacked(seeds, name, "validation") for name in ("kl", chooser))
        return [self.settings[index] for index in choose(Curve.of(kl, reward))]

    def curve(self, seeds: Sequence[int | None], figure: str, chooser: str | None) -> Curve:
        """A figure against KL of the envelope's settings, on the test prompts."""
        settings = self.envelope(seeds, chooser)
        return Curve.of(self.stacked(seeds, "kl", settings=settings), self.stacked(seeds, figure, settings=settings))


def arms_of(measured: Sequence[Measured]) -> list[Arm]:
    """The arms of a comparison, in order; an arm of one point has one seed, whatever it is called."""
    found: dict[str, dict[tuple, dict[int | None, Measured]]] = {}
    for one in measured:
        setting = setting_key(one.point.setting)
        found.setdefault(one.point.arm, {}).setdefault(setting, {})[one.point.seed] = one
    return [Arm(name, points) for name, points in found.items()]


def common_seeds(*arms: Arm) -> list[int | None]:
    """Seeds that every setting of every arm has; where each has one only, these are paired whatever they are."""
    every = [set(arm.seeds(setting)) for arm in arms for setting in arm.settings]
    shared = set.intersection(*every)
    return sorted(shared, key=lambda seed: (seed is None, seed))


def paired_by_seed(a: Arm, b: Arm) -> tuple[Arm, Arm, list[int | None]]:
    """Two arms with the seeds that they have in common; single seeds of different number are paired with each other.

    Returns:
        both arms and their seeds; an empty list where nothing can be paired.
    """
    seeds = common_seeds(a, b)
    if seeds:
        return a, b, seeds
    if all(len(arm.seeds(setting)) == 1 for arm in (a, b) for setting in arm.settings):
        return _nameless(a), _nameless(b), [None]
    return a, b, []


def _nameless(arm: Arm) -> Arm:
    return Arm(arm.name, {setting: {None: next(iter(points.values()))} for setting, points in arm.points.items()})
