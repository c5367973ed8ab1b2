"""Experiment trackers by accelerate's names, and the package that each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import no_package
from rlhf_pipeline.errors import Fault

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]


def is_installed(tracker: str) -> bool:
    """Return whether the package of a tracker is installed; tensorboard may be tensorboardX."""
    packages = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
    return any(importlib.util.find_spec(package) is not None for package in packages)


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if value is None or value == ["none"]:
        return ()
    if value == ["all"]:
        return tuple(name for name in get_args(Tracker) if is_installed(name))
    listed = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return tuple(dict.fromkeys(value)) if listed else value


ReportTo = Annotated[tuple[Tracker, ...], BeforeValidator(_listed)]


class Tracked(Protocol):
    """A config of a run that reports to trackers."""

    @property
    def report_to(self) -> tuple[Tracker, ...]: ...


def check_trackers(config: Tracked) -> Iterator[Fault]:
    """Yield the faults of trackers whose package is missing."""
    for index, tracker in enumerate(config.report_to):
        if not is_installed(tracker):
            yield no_package(f"report_to.{index}", tracker, tracker, f"pip install {tracker}, or remove it")
