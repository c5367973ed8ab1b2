"""Points: the trained models of an arm, one for each seed and setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config.grid import Node
from rlhf_pipeline.config.spec import StageSpec
from rlhf_pipeline.registry.store import Registry


@dataclass(frozen=True)
class Point:
    """One trained model of an arm.

    Args:
        arm: the way of training: the name of an experiment's stage, or a reference.
        seed: the experiment's seed that it belongs to, else its own; None where neither is known.
        setting: the swept values that made it: its own by key, those of stages before it as `stage.key`.
        model: its reference. step: of a snapshot in the middle of a run.
    """

    arm: str
    seed: int | None
    setting: dict[str, Any]
    model: str
    step: int | None = None


def points_of(compare: StageSpec, made: Sequence[tuple[Node, str]], registry: Registry) -> tuple[Point, ...]:
    """The points of a comparison's arms, arm by arm, each in running order.

    An arm that names a stage has all its nodes; one from outside the experiment is a point by itself.

    Args:
        compare: the comparison, in which arms still name stages. made: every node with the model that it made.
    """
    points: list[Point] = []
    for index, arm in enumerate(compare.config.arms):
        stage = compare.links.get(("arms", index))
        if stage is None:
            found = registry.resolve(arm)
            seed = None if found.manifest is None else found.manifest.seed
            points.append(Point(arm, seed, {}, found.label, found.step))
            continue
        for node, model in made:
            if node.name == stage:
                seed = node.spec.config.seed if node.seed is None else node.seed
                points.append(Point(stage, seed, dict(node.setting), model))
    return tuple(points)


def trials(points: Iterable[Point]) -> dict[str, int]:
    """How many settings were tried for each arm."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        known = settings.setdefault(point.arm, [])
        if point.setting not in known:
            known.append(point.setting)
    return {arm: len(known) for arm, known in settings.items()}
