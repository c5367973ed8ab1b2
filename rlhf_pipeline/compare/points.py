"""Points: the trained models of an arm, one for each seed and setting, and the snapshots on the way to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_pipeline.config.grid import Node, StageSpec
from rlhf_pipeline.config.in_context import name_arm, split_arm
from rlhf_pipeline.registry.digests import files_digest, snapshot_files, snapshot_steps
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry


@dataclass(frozen=True)
class Point:
    """One trained model of an arm.

    Args:
        arm: the way of training: the name of an experiment's stage, or a reference.
        seed: the seed of the experiment, else the model's own; None if neither is known.
        setting: the swept values: its own by key, those of earlier stages as `stage.key`.
        model: its reference.
        step: the step of a snapshot; None for the final model, and for a snapshot that was named as an arm, since it
            is the only point of its arm.
    """

    arm: str
    seed: int | None
    setting: dict[str, object]
    model: str
    step: int | None = None


def points_of(compare: StageSpec, made: Sequence[tuple[Node, str]], registry: Registry) -> tuple[Point, ...]:
    """The points of a comparison's arms, arm by arm, each in running order.

    An arm that names a stage has all nodes of that stage; a model from outside the experiment is one point. With
    `snapshots`, the snapshots of a run come before its model.

    Args:
        compare: the comparison, in which arms still name stages. made: every node with the model that it made.
    """
    points: list[Point] = []
    wanted = compare.config.snapshots
    for index, arm in enumerate(compare.config.arms):
        stage, (method, reference) = compare.links.get(("arms", index)), split_arm(arm)
        if stage is None:
            found = replace(registry.resolve(reference), method=method)
            seed = None if found.manifest is None else found.manifest.seed
            points += with_snapshots(Point(arm, seed, {}, found.label), found, wanted)
            continue
        for node, model in made:
            if node.name == stage:
                seed = node.spec.config.seed if node.seed is None else node.seed
                point = Point(name_arm(method, stage), seed, dict(node.setting), name_arm(method, model))
                points += with_snapshots(point, registry.resolve(model)) if wanted and method is None else [point]
    return tuple(points)


def with_snapshots(point: Point, model: Resolved, wanted: bool = True) -> list[Point]:
    """The snapshots of a point's run in order of steps, then the point; only the point if none are wanted.

    A snapshot with the same files as the model (that of the last step) is left out.
    """
    if not wanted or model.kind != "registry" or model.step is not None or model.method is not None:
        return [point]
    files = model.files
    steps = [step for step in snapshot_steps(files) if files_digest(snapshot_files(files, step)) != model.digest]
    return [*(replace(point, model=f"{model.label}#{step}", step=step) for step in steps), point]
