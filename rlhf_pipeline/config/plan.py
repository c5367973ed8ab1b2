"""Keys of `rlhf run`: the file that names the stages of an experiment; `experiment` reads the configs of the stages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import CommandConfig, Count, Name, Seed, option, wrong
from rlhf_pipeline.errors import Fault, did_you_mean

COMMANDS = ("sft", "train-rm", "ppo", "dpo", "collect")
# The meaning of `seed_resamples: arms`: the compared models, and the reward models that they are trained on.
ARMS = ("train-rm", "ppo", "dpo")
# In `stage.key=value` a dot would separate a stage from a key.
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = ("name", "seeds", "seed_resamples", "stages", "compare", "sweep", "world")


def _resamples(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("arms", "all"):
            raise wrong("arms, all, or a list of stages", f"write [{value}] for this stage only")
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise wrong("arms, all, or a list of stages")
    return tuple(value)


def check_stages(config: ExperimentConfig) -> Iterator[Fault]:
    """Yield the faults of stages' names and commands."""
    if not config.stages:
        yield Fault("stages", "found none", "at least one stage")
    for name, entry in config.stages.items():
        where = f"stages.{name}"
        if not _STAGE_NAME.fullmatch(name):
            yield Fault("stages", f"{name!r} is not a valid stage name", "1 to 64 letters, digits, '_' or '-'")
        elif name in _RESERVED:
            yield Fault(where, f"the name {name!r} is reserved", "another name for the stage")
        command = entry.get("stage")
        if command is None:
            yield Fault(f"{where}.stage", "missing", f"one of {', '.join(COMMANDS)}")
        elif command not in COMMANDS:
            near = did_you_mean(str(command), COMMANDS)
            yield Fault(f"{where}.stage", f"found {command!r}", f"one of {', '.join(COMMANDS)}", near)


def check_seeds(config: ExperimentConfig) -> Iterator[Fault]:
    """Yield the faults of seeds that are given twice."""
    seeds = config.seeds or ()
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            yield Fault(f"seeds.{index}", f"{seed} is given twice", "each seed once", "remove one")


def check_resampled(config: ExperimentConfig) -> Iterator[Fault]:
    """Yield the faults of resampled stages that do not exist."""
    if isinstance(config.seed_resamples, str):
        return
    for index, name in enumerate(config.seed_resamples):
        if name not in config.stages:
            expected = f"stages of this experiment: {', '.join(config.stages)}"
            near = did_you_mean(name, config.stages)
            yield Fault(f"seed_resamples.{index}", f"there is no stage {name!r}", expected, near)


class ExperimentConfig(CommandConfig):
    """Config of `rlhf run`."""

    stage: ClassVar[str] = "experiment"
    checks: ClassVar = (check_stages, check_seeds, check_resampled)

    name: Name = option(..., "name of the experiment and of its report", examples=["experiment"])
    seeds: tuple[Seed, ...] | None = option(
        None,
        "seeds of the experiment; stages that run once use the first (default: each stage's own seed)",
        min_length=1,
    )
    seed_resamples: Annotated[Literal["arms", "all"] | tuple[str, ...], BeforeValidator(_resamples)] = option(
        "arms", "stages that each further seed repeats: arms (train-rm, ppo and dpo), all, or a list of stages (ours)"
    )
    stages: dict[str, dict[str, Any]] = option(
        ..., "stages in order, each as name: {stage, config, key: value}", examples=[{"sft": {"stage": "sft"}}]
    )
    compare: dict[str, Any] | None = option(None, "comparison at the end, as {arms, baseline, judge, config}")
    sweep: dict[str, Any] | None = option(
        None, "values to try, as {stage.key: [value, ...]}; two keys of one stage are crossed (ours: none)"
    )
    rounds: Count = option(
        1,
        "rounds of collecting and training: from the second on, each arm collects from its own policy of the round "
        "before, and trains again from its start, as the stages NAME-2, NAME-3, ... (ours: one)",
    )
    round_arms: tuple[str, ...] | None = option(
        None, "ppo and dpo stages that have rounds (default: all on data that the experiment collects)", min_length=1
    )
    round_data: Literal["all", "last"] = option(
        "all", "data that a later round trains on: of all rounds so far, or of the last one (ours)"
    )


def drawn_by_seed(config: ExperimentConfig, commands: Mapping[str, str], pinned: Collection[str]) -> tuple[str, ...]:
    """Return the stages that each seed runs again by the config, in order, without the stages that depend on them.

    Args:
        commands: the command of each stage.
        pinned: stages that set their own seed; they keep it unless they are listed by name.
    """
    chosen = config.seed_resamples
    if len(config.seeds or ()) < 2:
        return ()
    if not isinstance(chosen, str):
        return tuple(name for name in commands if name in chosen)
    kinds = ARMS if chosen == "arms" else COMMANDS
    return tuple(name for name, command in commands.items() if command in kinds and name not in pinned)
