"""Figures of an arm as tables over setting, seed and prompt, so that arms can be paired by seed and prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from rlhf_pipeline.algorithms.preference import Optimum
from rlhf_pipeline.compare.rows import Measured
from rlhf_pipeline.evaluation.frontier import Curve, choose
from rlhf_pipeline.registry.parents import beta_of

Seeds = Sequence[int | None]
"""The seeds of an arm; None where it is not known."""


@dataclass(frozen=True)
class Setting:
    """The swept values of a point as a dictionary key; `step` is the step of a snapshot."""

    key: str
    step: int | None
    values: dict[str, object] = field(compare=False)


def setting_key(setting: Mapping[str, object], step: int | None = None) -> Setting:
    """Return a setting, or a snapshot of it, as a dictionary key."""
    return Setting(json.dumps(setting, sort_keys=True, default=str), step, dict(setting))


@dataclass(frozen=True)
class Arm:
    """The measured points of one arm, by setting (or snapshot) and seed."""

    name: str
    points: dict[Setting, dict[int | None, Measured]]

    @property
    def settings(self) -> list[Setting]:
        """The settings, in the order in which they were given."""
        return list(self.points)

    @property
    def finals(self) -> Arm:
        """The arm without its snapshots: final models only."""
        return Arm(self.name, {setting: found for setting, found in self.points.items() if setting.step is None})

    @property
    def sampled(self) -> Arm:
        """The arm by samples of its policies themselves, which its KL belongs to."""
        points = self.points.items()
        return Arm(
            self.name, {setting: {seed: one.sampled for seed, one in found.items()} for setting, found in points}
        )

    @property
    def snapshots(self) -> int:
        """Number of snapshots, over all settings and seeds."""
        return sum(len(found) for setting, found in self.points.items() if setting.step is not None)

    def complete(self, seeds: Seeds) -> list[Setting]:
        """The settings and snapshots that all of these seeds have."""
        return [setting for setting, found in self.points.items() if set(seeds) <= set(found)]

    def seeds(self, setting: Setting) -> list[int | None]:
        return list(self.points[setting])

    def beta(self, setting: Setting) -> float | None:
        """The beta of a setting; None if the optimum is not pi_ref exp(r / beta) / Z.

        It is the same for all seeds, but with an adaptive kl_coef: then it is the mean of those where they ended.
        """
        found = [beta_of(one.model) for one in self.points[setting].values()]
        known = [beta for beta in found if beta is not None]
        if self.optimum(setting) != "same" or len(known) < len(found):
            return None
        return known[0] if len(set(known)) == 1 else fmean(known)

    def optimum(self, setting: Setting) -> Optimum:
        """How the optimum of a setting relates to pi_ref exp(r / beta), the same for all its seeds."""
        return self._first(setting).aim.optimum

    def _first(self, setting: Setting) -> Measured:
        return next(iter(self.points[setting].values()))

    def values(self, setting: Setting, seeds: Seeds, figure: str, split: str = "test") -> np.ndarray:
        """A figure as a mean over the samples of each prompt, (S, P)."""
        return np.stack([self.points[setting][seed].values(figure, split) for seed in seeds])

    def stacked(
        self, seeds: Seeds, figure: str, split: str = "test", settings: Sequence[Setting] | None = None
    ) -> np.ndarray:
        """`values` of several settings, (S, G, P); by default of all settings that these seeds have."""
        chosen = self.complete(seeds) if settings is None else settings
        return np.stack([self.values(setting, seeds, figure, split) for setting in chosen], 1)

    @property
    def validated(self) -> bool:
        """Whether every point was measured on validation prompts too."""
        return all(point.validation is not None for points in self.points.values() for point in points.values())

    def envelope(self, seeds: Seeds, chooser: str | None, cost: np.ndarray | None = None) -> list[Setting]:
        """The settings and snapshots that are Pareto-optimal in KL (or cost) and the chooser's figure.

        They are chosen on the validation prompts. The chooser is a figure that a user has (a judge, a reward model),
        not the true reward that is shown on the test prompts. Without validation figures, all of them are returned.

        Args:
            cost: (S, G), the cost of `complete(seeds)`; replaces KL if it is given.
        """
        known = self.complete(seeds)
        if chooser is None or not self.validated or len(known) < 2:
            return known
        x = self.stacked(seeds, "kl", "validation") if cost is None else cost
        return [known[index] for index in choose(Curve.of(x, self.stacked(seeds, chooser, "validation")))]

    def curve(self, seeds: Seeds, figure: str, chooser: str | None) -> Curve:
        """A figure against KL at the settings of the envelope, on the test prompts."""
        settings = self.envelope(seeds, chooser)
        return Curve.of(self.stacked(seeds, "kl", settings=settings), self.stacked(seeds, figure, settings=settings))


def arms_of(measured: Sequence[Measured]) -> list[Arm]:
    """The arms of a comparison, in order; an arm with one point has one seed, whatever its name."""
    found: dict[str, dict[Setting, dict[int | None, Measured]]] = {}
    for one in measured:
        setting = setting_key(one.point.setting, one.point.step)
        found.setdefault(one.point.arm, {}).setdefault(setting, {})[one.point.seed] = one
    return [Arm(name, points) for name, points in found.items()]


def common_seeds(*arms: Arm) -> list[int | None]:
    """Seeds that every setting of every arm has, without snapshots."""
    every = [set(arm.seeds(setting)) for arm in arms for setting in arm.finals.settings]
    shared = set.intersection(*every)
    return sorted(shared, key=lambda seed: (seed is None, seed))


def paired_by_seed(a: Arm, b: Arm) -> tuple[Arm, Arm, list[int | None]]:
    """Pair two arms by the seeds that they have in common; two arms with one seed each are always paired.

    Returns:
        both arms and their seeds; an empty list if nothing can be paired.
    """
    seeds = common_seeds(a, b)
    if seeds:
        return a, b, seeds
    if all(len(arm.seeds(setting)) == 1 for arm in (a, b) for setting in arm.settings):
        return _nameless(a), _nameless(b), [None]
    return a, b, []


def _nameless(arm: Arm) -> Arm:
    return Arm(arm.name, {setting: {None: next(iter(points.values()))} for setting, points in arm.points.items()})
