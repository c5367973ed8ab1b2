"""The best evaluation of a run: its weights in runs/<id>/best/, and when to stop because none is better."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import ConfigError, DamagedFile, Fault
from rlhf_pipeline.models.sharding import load_state
from rlhf_pipeline.training.checkpoint import PREFIX, replacing, trained_state, unshared

WEIGHTS, ALIASES = "model.safetensors", "aliases.json"


class Best:
    """The best evaluation so far; the same on every rank, because every rank evaluates.

    As in transformers, an evaluation is better if its metric is better than the best before, and it resets the count of
    `early_stopping_patience` if it is better by more than `early_stopping_threshold`.
    """

    def __init__(self, config: TrainingConfig, directory: Path, *, writes: bool):
        self.metric, self.greater = config.best_metric, config.best_is_greatest
        self.patience, self.threshold = config.early_stopping_patience, config.early_stopping_threshold
        self.keeps, self.folder, self.writes = config.load_best_model_at_end, directory / "best", writes
        self.key = config.following_key
        self.value: float | None = None
        self.step: int | None = None
        self.misses = 0
        self._needed: int | None = None  # the best step of the newest checkpoint, which a resumed run starts from

    def require(self, evaluates: bool) -> None:
        """Check that a run evaluates.

        Raises:
            ConfigError: its test split has no examples.
        """
        if not evaluates:
            found = f"there are no held-out examples to measure {self.metric} on"
            raise ConfigError(Fault(self.key, found, "a dataset_test_split with examples", f"or remove {self.key}"))

    @property
    def given_up(self) -> bool:
        """Whether the run must stop: `early_stopping_patience` evaluations in a row were no better."""
        return self.patience is not None and self.misses >= self.patience

    def consider(self, step: int, value: float, model: nn.Module) -> bool:
        """Keep the weights of a better evaluation; returns whether the run must stop."""
        gain = math.inf if self.value is None else (value - self.value) * (1 if self.greater else -1)
        better = gain > 0 or (math.isnan(gain) and not math.isnan(value))
        self.misses = 0 if better and not gain <= self.threshold else self.misses + 1
        if better and not math.isnan(value):
            self.value, self.step = value, step
            if self.keeps:
                self._write(model)
        return self.given_up

    def _write(self, model: nn.Module) -> None:
        from safetensors.torch import save_file

        trained = trained_state(model)
        if not self.writes:
            return
        weights, aliases = unshared(trained)
        with replacing(self.folder / f"{PREFIX}{self.step}") as staged:
            save_file(weights, staged / WEIGHTS)
            (staged / ALIASES).write_text(json.dumps(aliases), encoding="utf-8")
        self._prune()

    def _prune(self) -> None:
        kept = {f"{PREFIX}{self.step}", f"{PREFIX}{self._needed}"}
        for path in self.folder.glob(f"{PREFIX}*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"value": self.value, "step": self.step, "misses": self.misses}

    def saved(self) -> None:
        """A checkpoint has been written: weights that only earlier ones need are removed."""
        self._needed = self.step
        if self.writes:
            self._prune()

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from the state of a checkpoint."""
        if state is not None:
            self.value, self.step, self.misses = state["value"], state["step"], state["misses"]
            self._needed = self.step

    def load(self, model: nn.Module) -> None:
        """Put the weights of the best evaluation into the model.

        Raises:
            DamagedFile: they are missing.
        """
        from safetensors.torch import load_file

        folder = self.folder / f"{PREFIX}{self.step}"
        if not (folder / WEIGHTS).is_file():
            raise DamagedFile(f"{folder}: missing; expected the weights of the best evaluation; run with --no-resume")
        weights = load_file(folder / WEIGHTS)
        aliases = json.loads((folder / ALIASES).read_text(encoding="utf-8"))
        load_state(model, weights | {alias: weights[name] for alias, name in aliases.items()})
