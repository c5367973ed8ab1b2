"""Keys of `rlhf dpo`: direct preference optimisation on pairs or rankings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import ModelInput, Positive, Text, option
from rlhf_pipeline.config.sharding import OFF
from rlhf_pipeline.config.training import COMMON_CHECKS, NATIVE, TrainingConfig, check_model
from rlhf_pipeline.errors import Fault


def _single(value: Any) -> Any:
    """Return the only entry of a list, because TRL writes loss_type as a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


SMOOTHED = ("sigmoid", "robust")
"""The losses that define `label_smoothing`."""


def check_smoothing(config: DpoConfig) -> Iterator[Fault]:
    """Yield the fault of label smoothing with a loss that does not define it."""
    if config.label_smoothing and config.loss_type not in SMOOTHED:
        found = f"label_smoothing {config.label_smoothing:g} with loss_type {config.loss_type}"
        yield Fault("label_smoothing", found, f"label_smoothing 0, or loss_type {' or '.join(SMOOTHED)}")


def check_minimum(config: DpoConfig) -> Iterator[Fault]:
    """Yield the fault of a loss without a minimum in a run that nothing stops."""
    stops = config.early_stopping_patience is not None or config.load_best_model_at_end
    if config.loss_type == "apo_down" and config.engine == "native" and not stops:
        found = "found 'apo_down', which has no minimum: it falls until one response has all the probability"
        fix = "or apo_zero, which raises the chosen response"
        yield Fault("loss_type", found, "early_stopping_patience or load_best_model_at_end beside it", fix)


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


TRL_LOSSES = "sigmoid, robust, hinge, ipo_mean, sigmoid_norm or apo_zero"


def check_dpo_engine(config: DpoConfig) -> Iterator[Fault]:
    """Yield the faults of `engine: trl` for DPO."""
    if config.engine != "trl":
        return
    if config.loss_type == "ipo":
        found = "TRL has no ipo on summed log-probabilities: its 'ipo' averages them over each response's tokens"
        yield Fault("loss_type", found, TRL_LOSSES, NATIVE)
    if config.loss_type == "plackett_luce":
        found = "found 'plackett_luce', but TRL's trainer accepts only pairs and splits rankings into pairs"
        yield Fault("loss_type", found, TRL_LOSSES, NATIVE)
    if config.loss_type == "apo_down":
        found = "found 'apo_down', which must be stopped early: engine trl keeps no weights of evaluations"
        yield Fault("loss_type", found, TRL_LOSSES, NATIVE)
    if config.label_smoothing and config.loss_type == "sigmoid":
        found = f"found {config.label_smoothing:g}, which TRL's sigmoid loss ignores silently"
        yield Fault("label_smoothing", found, "0", NATIVE)
    if config.soft_labels:
        yield Fault("soft_labels", "TRL trains only on hard labels", "false", NATIVE)
    if config.population:
        found = f"{config.dataset_name}: fresh pairs at every step with label probabilities, which TRL does not support"
        yield Fault("dataset_name", found, "recorded pairs", NATIVE)


LossType = Literal[
    "sigmoid", "robust", "hinge", "ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "apo_down", "plackett_luce"
]


class DpoConfig(TrainingConfig):
    """Config of `rlhf dpo`."""

    stage: ClassVar[str] = "dpo"
    checks: ClassVar = (
        check_model,
        *COMMON_CHECKS,
        check_smoothing,
        check_minimum,
        check_ranking_loss,
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
        "preference loss (docs/methods/preference.md): sigmoid (DPO paper); robust: sigmoid that corrects a share "
        "label_smoothing of flipped labels; hinge: ignores how much a response is preferred; ipo: squared, has another "
        "scale of beta (IPO paper); ipo_mean: the same on means over tokens (TRL's ipo), depends on lengths; "
        "sigmoid_norm: sigmoid on means (TRL); apo_zero: each response by itself, losers get probability 0; apo_down: "
        "has no minimum, needs early stopping; plackett_luce: whole rankings without ties (DPO paper, A.3), has "
        "sigmoid's optimum for rankings from the Plackett-Luce model, rewards x .91 to .95 for others. Other losses "
        "read a ranking's untied pairs in one pass, each with weight 1 / their number (InstructGPT)",
        moves_optimum=True,
        neutral=("sigmoid", "robust", "plackett_luce"),
    )
    label_smoothing: float = option(
        0.0,
        "eps; with sigmoid: trains on p (1 - eps) + (1 - p) eps instead of p (cDPO; DPO paper: 0). It shrinks margins. "
        "It does not correct flipped labels, but smooths them a second time; with robust: the share of labels that are "
        "flipped, which is corrected",
        moves_optimum=True,
        unless=("loss_type", "robust"),
        ge=0,
        lt=0.5,
    )
    soft_labels: bool = option(
        False, "train on the recorded label_probability instead of the drawn label; same optimum (ours: off)"
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
