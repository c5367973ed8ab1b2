"""Keys of `rlhf dpo`: direct preference optimisation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import Positive, Text, option
from rlhf_pipeline.config.training import COMMON_CHECKS, TrainingConfig, check_model


def _single(value: Any) -> Any:
    """Return the only entry of a list: TRL writes loss_type as one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class DpoConfig(TrainingConfig):
    """Config of `rlhf dpo`."""

    stage: ClassVar[str] = "dpo"
    checks: ClassVar = (check_model, *COMMON_CHECKS)

    learning_rate: Positive = option(1e-6, "peak step size of AdamW (TRL)")
    beta: Positive = option(0.1, "strength of the KL term: larger stays nearer to the reference (DPO paper)")
    ref_model: Text | None = option(None, "frozen reference model (DPO paper: the start of training)")
    precompute_ref_log_probs: bool = option(
        True, "compute the reference's log-probabilities once and cache them (ours: epochs share them)"
    )
    loss_type: Annotated[Literal["sigmoid"], BeforeValidator(_single)] = option(
        "sigmoid", "preference loss (DPO paper)"
    )
    label_smoothing: float = option(
        0.0, "assumed share of flipped labels (DPO paper: 0)", moves_optimum=True, ge=0, lt=0.5
    )
