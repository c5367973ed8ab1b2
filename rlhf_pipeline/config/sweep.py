"""The `sweep` of an experiment: the keys of its stages that take several values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config import keys
from rlhf_pipeline.config.base import CommandConfig
from rlhf_pipeline.config.draft import Draft, Override, split_key
from rlhf_pipeline.config.dump import RUN_ONLY
from rlhf_pipeline.config.stages import SCHEMAS
from rlhf_pipeline.config.yaml import KeyPath
from rlhf_pipeline.errors import Fault, did_you_mean

# PPO's kl_coef is DPO's beta: settings use one name, so that arms can be compared.
_SETTING_NAMES: dict[KeyPath, str] = {("ppo", "kl_coef"): "beta"}


@dataclass(frozen=True)
class Axis:
    """A swept key of a stage; `name` is its name in a setting, `overrides` hold its values and their places."""

    key: str
    stage: str
    path: KeyPath
    name: str
    overrides: tuple[Override, ...]


def canonical(command: str, path: KeyPath) -> KeyPath:
    """Return the path of a key of a stage command, with its alias replaced."""
    return (keys.canonical(command, str(path[0])), *path[1:])


def spelling(sweep: Any, stage: str, command: str, path: KeyPath) -> str:
    """Return a stage's key as the sweep already writes it, else the key itself, so an override by alias replaces it."""
    text = ".".join(map(str, (stage, *path)))
    if command not in keys.ALIASES or not isinstance(sweep, dict):
        return text
    for key in sweep:
        name, _, rest = str(key).partition(".")
        if name == stage and rest and canonical(command, split_key(rest)) == canonical(command, path):
            return str(key)
    return text


def read_sweep(plan: Draft, commands: Mapping[str, str], overrides: Mapping[str, Sequence[Override]]) -> list[Axis]:
    """Return the axes of an experiment's sweep, without those that an override of their key replaces.

    Args:
        plan: the experiment's own values; it gets the faults of the sweep's keys, and notes on axes that are replaced.
        commands: the command of each stage.
        overrides: the overrides of each stage.
    """
    sweep = plan.values.get("sweep")
    axes: list[Axis] = []
    for key, values in sweep.items() if isinstance(sweep, dict) else ():
        axis = _axis(plan, commands, str(key), values)
        if axis is None:
            continue
        command = commands[axis.stage]
        before = next((a for a in axes if a.stage == axis.stage and _overlap(a.path, axis.path)), None)
        by = [o for o in overrides.get(axis.stage, ()) if _overlap(canonical(command, o.path), axis.path)]
        if before is not None:
            plan.fault(("sweep", axis.key), f"the same key as {before.key}", "one of the two", "remove one")
        elif by:
            plan.notes.append(f"{by[-1].where}: replaces the sweep of {axis.key}")
        else:
            axes.append(axis)
    return axes


def given_twice(override: Override) -> Fault:
    """Return the fault of a value that a sweep contains twice."""
    return Fault(override.where, f"{override.value!r} is given twice", "each value once", "remove one")


def _axis(plan: Draft, commands: Mapping[str, str], text: str, values: Any) -> Axis | None:
    """Return an axis with its distinct values, or None if its key cannot be swept."""
    place: KeyPath = ("sweep", text)
    stage, dot, rest = text.partition(".")
    stages = plan.values.get("stages")
    known = list(stages) if isinstance(stages, dict) else []
    if stage not in known:
        near = did_you_mean(stage, known)
        plan.fault(place, f"the experiment has no stage {stage!r}", "stage.key: [value, ...]", near)
        return None
    if not dot or "" in rest.split("."):
        plan.fault(place, f"{text!r} names no key of a stage", "stage.key: [value, ...]")
        return None
    if stage not in commands:
        return None  # of unknown kind: the stage itself reports this fault
    command, path = commands[stage], split_key(rest)
    refused = next(_refusals(command, str(canonical(command, path)[0])), None)
    if refused is not None:
        plan.fault(place, *refused)
        return None
    if not isinstance(values, list | tuple) or not values:
        plan.fault(place, f"found {values!r}", "a list of values")
        return None
    overrides: list[Override] = []
    for index, value in enumerate(values):
        override = Override(path, value, plan.where((*place, index)))
        if keys.same(value, tuple(earlier.value for earlier in overrides)):
            plan.faults.append(given_twice(override))
        else:
            overrides.append(override)
    own = canonical(command, path)
    name = _SETTING_NAMES.get((command, *own), ".".join(map(str, own)))
    return Axis(text, stage, own, name, tuple(overrides))


def _refusals(command: str, key: str) -> Iterator[tuple[str, str, str]]:
    """Yield the reasons why a key of a stage command cannot be swept: what was found, what was expected, what to do."""
    if key == "seed":
        yield "a seed is not a setting", "seeds: [...] of the experiment", ""
    if key == "output_name":
        yield "points are versions of one name", "no sweep of output_name", "remove it"
    if key in RUN_ONLY:
        yield f"{key} does not change the result of a run", "a key that does", "remove it"
    if key not in SCHEMAS[command].model_fields:
        if keys.later(command, key) is not None:
            yield "this key is not available yet in this version", "", "remove it"
        yield f"{command} has no such key", "", keys.REFUSED.get(key) or keys.advice_on_unknown(command, key)


def _overlap(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Return whether two paths are the same, or one is a prefix of the other."""
    return all(a == b for a, b in zip(first, second, strict=False))


def swept(axis: Axis, config: CommandConfig) -> Any:
    """Return the value of a valid config at the path of an axis."""
    value: Any = config.model_dump()
    for part in axis.path:
        value = value[part]
    return value


def repeated(axes: Sequence[Axis], configs: Mapping[tuple[int, ...], CommandConfig]) -> Iterator[Fault]:
    """Yield the faults of equal values that are written differently, at the first values of the other axes."""
    for number, axis in enumerate(axes):
        seen: list[Any] = []
        for index, override in enumerate(axis.overrides):
            config = configs.get(tuple(index if place == number else 0 for place in range(len(axes))))
            if config is None:
                continue
            if config in seen:
                yield dataclasses.replace(given_twice(override), expected="values that differ")
            seen.append(config)
