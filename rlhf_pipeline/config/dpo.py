"""Keys of `rlhf dpo`: direct preference optimisation on pairs or rankings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from rlhf_pipeline.config.base import ModelInput, Positive, option
from rlhf_pipeline.config.kto import check_kto
from rlhf_pipeline.config.loss_checks import (
    check_chosen,
    check_divergence,
    check_margin,
    check_minimum,
    check_moving_reference,
    check_owned,
    check_ranking_loss,
    check_reference_free,
    check_shared_length,
    check_trl_losses,
    check_weights,
    remark_on_flips,
)
from rlhf_pipeline.config.losses import WithLosses
from rlhf_pipeline.config.sharding import OFF
from rlhf_pipeline.config.training import COMMON_CHECKS, NATIVE, check_model
from rlhf_pipeline.errors import Fault


def check_population(config: DpoConfig) -> Iterator[Fault]:
    """Yield the faults of a run on fresh pairs, which has no epochs and a whole reference."""
    if config.population and config.max_steps < 1:
        yield Fault("max_steps", f"found {config.max_steps}", "a number >= 1: fresh pairs have no epochs")
    if config.population and config.fsdp:
        found = f"{config.dataset_name}: fresh pairs, which only a whole reference can draw, with fsdp"
        yield Fault("dataset_name", found, "recorded pairs", OFF)


def check_dpo_engine(config: DpoConfig) -> Iterator[Fault]:
    """Yield the faults of `engine: trl` for DPO."""
    if config.engine != "trl":
        return
    if config.soft_labels:
        yield Fault("soft_labels", "TRL trains only on hard labels", "false", NATIVE)
    if config.population:
        found = f"{config.dataset_name}: fresh pairs at every step with label probabilities, which TRL does not support"
        yield Fault("dataset_name", found, "recorded pairs", NATIVE)


class DpoConfig(WithLosses):
    """Config of `rlhf dpo`."""

    stage: ClassVar[str] = "dpo"
    checks: ClassVar = (
        check_model,
        *COMMON_CHECKS,
        check_weights,
        check_owned,
        check_divergence,
        check_shared_length,
        check_moving_reference,
        check_minimum,
        check_reference_free,
        check_chosen,
        check_ranking_loss,
        check_margin,
        check_kto,
        check_population,
        check_trl_losses,
        check_dpo_engine,
    )
    remarks: ClassVar = (remark_on_flips,)

    learning_rate: Positive = option(1e-6, "peak learning rate of AdamW (TRL)")
    population_proposal: Literal["mixture", "reference"] = option(
        "mixture",
        "distribution of both responses in fresh pairs of world:verdicts; mixture: half reference, half exact optimum; "
        "same optimum (ours)",
    )

    def parents(self) -> dict[str, ModelInput]:
        """Return the models that the policy comes from: its start and the reference, which is by default the same."""
        found = super().parents()
        if not self.needs_reference:
            return found
        return found | {"reference": found["base"] if self.ref_model is None else ModelInput(self.ref_model)}

    @property
    def reads_prompts(self) -> bool:
        """Whether the stage reads only prompts from its data."""
        return self.population
