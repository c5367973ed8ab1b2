"""Experiment trackers beside metrics.jsonl, by accelerate: tensorboard, wandb, trackio, mlflow and others."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import ConfigError, Fault, first_line

PROJECT = "rlhf"


class Trackers:
    """The trackers of a run, on its first process.

    A tracker that fails to start stops the run before it trains; one that fails later is told and left out, because no
    figure is lost: metrics.jsonl has all of them.
    """

    def __init__(self, config: TrainingConfig, directory: Path, say: Callable[[str], None]):
        self._say = say
        self._running: dict[str, Any] = {}
        for index, name in enumerate(config.report_to):
            try:
                with redirect_stdout(sys.stderr):
                    self._running[name] = _start(name, directory, config)
            except Exception as error:
                self.finish()
                found = f"{name} does not start: {first_line(error)}"
                raise ConfigError(Fault(f"report_to.{index}", found, "a tracker that works", "or remove it")) from error
            say(f"report_to: {name}")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of an update, or of an evaluation after it."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name in list(self._running):
            self._safely(name, lambda tracker: tracker.log(finite, step=step))

    def finish(self) -> None:
        """End all trackers."""
        for name in list(self._running):
            self._safely(name, _finish)
        self._running.clear()

    def _safely(self, name: str, action: Callable[[Any], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the result
                action(self._running[name])
        except Exception as error:  # the network, a full disk, a bug of the tracker
            self._running.pop(name)
            self._say(f"report_to: {name} failed and is not used any more: {first_line(error)}")


def _start(name: str, directory: Path, config: TrainingConfig) -> Any:
    """Start a tracker, with the run's id as its name and the config as its parameters."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, project = LOGGER_TYPE_TO_CLASS[name], os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
    options: dict[str, Any] = {}
    if name == "wandb":
        options = {"name": directory.name, "id": directory.name, "resume": "allow", "dir": str(directory)}
        if not os.environ.get("WANDB_MODE") and not _wandb_key():
            options["mode"] = "offline"  # without an account wandb would ask for one
    if name in ("trackio", "swanlab"):
        options = {"name" if name == "trackio" else "experiment_name": directory.name}
    if name == "mlflow":
        options = {"run_name": directory.name}
    tracker = kind(name, str(directory), **options) if kind.requires_logging_directory else kind(project, **options)
    tracker.start()
    tracker.store_init_configuration(_flat(config.model_dump(mode="json")))
    return tracker


def _finish(tracker: Any) -> None:
    """End a tracker; trackio as a whole, which would otherwise end its run again, and print, when the process ends."""
    trackio = sys.modules.get("trackio") if getattr(tracker, "name", "") == "trackio" else None
    (trackio or tracker).finish()


def _wandb_key() -> bool:
    import wandb  # type: ignore[import-not-found, unused-ignore]

    return bool(wandb.api.api_key)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Parameters as trackers take them: numbers, texts and truth values, nested keys with dots; None is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            simple = isinstance(value, bool | int | float | str)
            found[f"{prefix}{key}"] = value if simple else json.dumps(value, ensure_ascii=False)
    return found
