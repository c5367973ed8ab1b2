"""The result of a stage; this module does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlhf_pipeline.training.tracking import jsonable


@dataclass(frozen=True)
class StageResult:
    """What a stage command prints: the model (or data), its path, its metrics and its cost.

    stopped_by: a signal that arrived after the last update; it is not printed.
    """

    stage: str
    model: str
    path: str
    run: str
    metrics: dict[str, Any]
    cost: dict[str, Any]
    stopped_by: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return jsonable({name: value for name, value in asdict(self).items() if name != "stopped_by"})
