"""Keys of `rlhf dpo`: direct preference optimisation on pairs or rankings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import ModelInput, Positive, Text, option
from rlhf_pipeline.config.kto import KtoKeys, check_kto
from rlhf_pipeline.config.sharding import OFF
from rlhf_pipeline.config.training import COMMON_CHECKS, NATIVE, check_model
from rlhf_pipeline.errors import Fault


def _single(value: Any) -> Any:
    """Return the only entry of a list, because TRL writes loss_type as a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def check_smoothing(config: DpoConfig) -> Iterator[Fault]:
    """Yield the fault of label smoothing with a loss that does not define it."""
    if config.label_smoothing and config.loss_type != "sigmoid":
        found = f"label_smoothing {config.label_smoothing:g} with loss_type {config.loss_type}"
        yield Fault("label_smoothing", found, "label_smoothing 0, or loss_type sigmoid")


def check_margin(config: DpoConfig) -> Iterator[Fault]:
    """Yield the faults of margins with a loss, labels or data that have none."""
    if not config.use_margin:
        return
    if config.loss_type != "sigmoid":
        found = f"found true with loss_type {config.loss_type}, which defines no margin"
        yield Fault("use_margin", found, "use_margin false, or loss_type sigmoid")
    if config.soft_labels or config.label_smoothing:
        other = "soft_labels" if config.soft_labels else "label_smoothing"
        found = f"found true with {other}: a margin belongs to a label that is certain"
        yield Fault("use_margin", found, f"use_margin or {other}, not both")
    if config.population:
        yield Fault("use_margin", f"{config.dataset_name}: fresh pairs have no margin", "false, or recorded pairs")
    if config.engine == "trl":
        yield Fault("use_margin", "TRL's DPOTrainer reads no margin", "false", NATIVE)


def check_ranking_loss(config: DpoConfig) -> Iterator[Fault]:
    """Yield the faults of a loss on rankings with label probabilities, which only pairs have."""
    if config.loss_type != "plackett_luce":
        return
    if config.soft_labels:
        fix = "soft_labels false, or loss_type sigmoid"
        yield Fault("soft_labels", "found true with loss_type plackett_luce, which uses no label probabilities", fix)
    if config.population:
        found = f"found 'plackett_luce', but {config.dataset_name} draws pairs with label probabilities"
        yield Fault("loss_type", found, "'sigmoid', which is the same loss on pairs")


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
    if config.loss_type == "ipo":
        found = "TRL has no ipo on summed log-probabilities: its 'ipo' averages them over each response's tokens"
        yield Fault("loss_type", found, "sigmoid, ipo_mean, sigmoid_norm or apo_zero", NATIVE)
    if config.loss_type == "plackett_luce":
        found = "found 'plackett_luce', but TRL's trainer accepts only pairs and splits rankings into pairs"
        yield Fault("loss_type", found, "sigmoid, ipo_mean, sigmoid_norm or apo_zero", NATIVE)
    if config.label_smoothing and config.loss_type == "sigmoid":
        found = f"found {config.label_smoothing:g}, which TRL's sigmoid loss ignores silently"
        yield Fault("label_smoothing", found, "0", NATIVE)
    if config.soft_labels:
        yield Fault("soft_labels", "TRL trains only on hard labels", "false", NATIVE)
    if config.population:
        found = f"{config.dataset_name}: fresh pairs at every step with label probabilities, which TRL does not support"
        yield Fault("dataset_name", found, "recorded pairs", NATIVE)


LossType = Literal[
    "sigmoid", "ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "plackett_luce", "kto", "apo_zero_unpaired"
]


class DpoConfig(KtoKeys):
    """Config of `rlhf dpo`."""

    stage: ClassVar[str] = "dpo"
    checks: ClassVar = (
        check_model,
        *COMMON_CHECKS,
        check_smoothing,
        check_ranking_loss,
        check_margin,
        check_kto,
        check_population,
        check_dpo_engine,
    )

    learning_rate: Positive = option(1e-6, "peak learning rate of AdamW (TRL)")
    beta: Positive = option(
        0.1, "strength of the KL term (ipo: tau); a larger beta stays closer to the reference (DPO paper)"
    )
    ref_model: Text | None = option(
        None,
        "frozen reference model (DPO paper: the initial model, which is PPO's reference)",
        names="policy",
        moves_optimum=True,
    )
    precompute_ref_log_probs: bool = option(
        True, "compute the reference's log-probabilities once, and cache them for all epochs and runs (ours)"
    )
    loss_type: Annotated[LossType, BeforeValidator(_single)] = option(
        "sigmoid",
        "preference loss (DPO paper); ipo: squared loss on sums of log-probabilities (IPO paper), has another scale of "
        "beta; ipo_mean: the same on their means (TRL's ipo), depends on lengths; sigmoid_norm: sigmoid on means "
        "(TRL), depends on lengths; apo_zero: each response by itself (APO paper), losers get probability 0; "
        "plackett_luce: whole rankings without ties (DPO paper, A.3), has sigmoid's optimum for rankings from the "
        "Plackett-Luce model, rewards x .91 to .95 for others; kto and apo_zero_unpaired: responses labelled good or "
        "bad, or pairs as two of them (KTO and APO papers). The other losses read a ranking's untied pairs in one "
        "pass, each with weight 1 / their number (InstructGPT)",
        moves_optimum=True,
        neutral=("sigmoid", "plackett_luce"),
    )
    label_smoothing: float = option(
        0.0,
        "eps, with sigmoid: trains on p (1 - eps) + (1 - p) eps instead of p (cDPO; DPO paper: 0). It shrinks margins. "
        "It does not correct flipped labels, but smooths them a second time",
        moves_optimum=True,
        ge=0,
        lt=0.5,
    )
    soft_labels: bool = option(
        False, "train on the recorded label_probability instead of the drawn label; same optimum (ours: off)"
    )
    use_margin: bool = option(
        False,
        "with sigmoid: subtract the pairs' column `margin` from the difference of the implicit rewards (ODPO, "
        "arXiv 2402.10571)",
        moves_optimum=True,
    )
    population_proposal: Literal["mixture", "reference"] = option(
        "mixture",
        "distribution of both responses in fresh pairs of world:verdicts; mixture: half reference, half exact optimum; "
        "same optimum (ours)",
    )

    def parents(self) -> dict[str, ModelInput]:
        """Return the models that the policy comes from: its start and the reference, which is by default the same."""
        found = super().parents()
        return found | {"reference": found["base"] if self.ref_model is None else ModelInput(self.ref_model)}

    @property
    def population(self) -> bool:
        """Whether pairs are drawn from the built-in world at every step."""
        return self.dataset_name == "world:verdicts"

    @property
    def reads_prompts(self) -> bool:
        """Whether the stage reads only prompts from its data."""
        return self.population
