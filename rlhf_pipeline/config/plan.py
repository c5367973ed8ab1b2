"""Keys of `rlhf run`: the file that names an experiment's stages; their own configs are in `experiment`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from pydantic import BaseModel

from rlhf_pipeline.config.base import STRICT, Name, Seed, option
from rlhf_pipeline.errors import Fault, did_you_mean

COMMANDS = ("sft", "train-rm", "ppo", "dpo", "collect")
# A dot would read as a key inside a stage in `stage.key=value`.
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = ("name", "seeds", "stages", "compare", "sweep", "world")


def check_stages(config: Any) -> Iterator[Fault]:
    """Yield the faults of stages' names and commands."""
    if not config.stages:
        yield Fault("stages", "there are none", "at least one stage")
    for name, entry in config.stages.items():
        where = f"stages.{name}"
        if not _STAGE_NAME.fullmatch(name):
            yield Fault("stages", f"{name!r} is no name of a stage", "1 to 64 letters, digits, '_' or '-'")
        elif name in _RESERVED:
            yield Fault(where, f"the name {name!r} is taken", "another name for the stage")
        command = entry.get("stage")
        if command is None:
            yield Fault(f"{where}.stage", "missing", f"one of {', '.join(COMMANDS)}")
        elif command not in COMMANDS:
            near = did_you_mean(str(command), COMMANDS)
            yield Fault(f"{where}.stage", f"found {command!r}", f"one of {', '.join(COMMANDS)}", near)


def check_later(config: Any) -> Iterator[Fault]:
    """Yield the faults of keys that belong to a later version."""
    if config.seeds is not None and len(config.seeds) > 1:
        found = f"{len(config.seeds)} seeds are not available yet in this version"
        yield Fault("seeds", found, "one seed", f"write seeds: [{config.seeds[0]}]")
    if config.sweep:
        yield Fault("sweep", "a sweep is not available yet in this version", "no sweep", "remove it")


class ExperimentConfig(BaseModel):
    """Config of `rlhf run`."""

    model_config = STRICT
    stage: ClassVar[str] = "experiment"
    checks: ClassVar[tuple[Callable[[Any], Iterator[Fault]], ...]] = (check_stages, check_later)

    name: Name = option(..., "name of the experiment and of its report", examples=["experiment"])
    seeds: tuple[Seed, ...] | None = option(
        None, "seeds of all stages, one run each (default: each stage's own seed)", min_length=1
    )
    stages: dict[str, dict[str, Any]] = option(
        ..., "stages in order: name: {stage, config, key: value}", examples=[{"sft": {"stage": "sft"}}]
    )
    compare: dict[str, Any] | None = option(None, "comparison at the end: {arms, baseline, config}")
    sweep: dict[str, Any] | None = option(None, "values of stage.key to try: not available yet")
