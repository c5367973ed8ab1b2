"""The losses of `rlhf dpo` by name, and the options that belong to some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from rlhf_pipeline.config.base import Count, Fraction, NonNegative, Positive, Text, option, wrong
from rlhf_pipeline.config.kto import UNPAIRED, KtoKeys
from rlhf_pipeline.errors import did_you_mean

LossType = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "ipo_mean",
    "sigmoid_norm",
    "apo_zero",
    "apo_down",
    "simpo",
    "orpo",
    "cpo",
    "plackett_luce",
    "kto",
    "apo_zero_unpaired",
]
LossTypes = tuple[LossType | Literal["sft"], ...]
SMOOTHED = ("sigmoid", "robust")
"""The losses that define `label_smoothing`."""

REFERENCE_FREE = ("simpo", "orpo", "cpo")
"""The losses that compute no reference: their beta is no price of KL."""

DIFFERENCES = ("sigmoid", "robust", "hinge", "ipo", "ipo_mean", "sigmoid_norm")
"""The losses of a difference of rewards, in which the constant of another divergence cancels."""


def _losses(value: Any) -> Any:
    """Return the name of a loss, or a tuple of several; TRL writes one in a list too."""
    names = get_args(LossType)
    value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if not isinstance(value, list | tuple):
        if value not in names:
            raise wrong(f"one of {', '.join(names)}", did_you_mean(str(value), names))
        return value
    summed = [name for name in names if name not in UNPAIRED]
    if not all(isinstance(name, str) and name in (*summed, "sft") for name in value):
        raise wrong(f"names among {', '.join(summed)} and sft")
    if len(set(value)) < len(value) or not set(value) - {"sft"}:
        raise wrong("different names, among them a preference loss")
    return tuple(value)


def _divergence(value: Any) -> Any:
    return value.removesuffix("_divergence") if isinstance(value, str) else value  # TRL's names


Divergence = Annotated[Literal["reverse_kl", "forward_kl", "js", "alpha"], BeforeValidator(_divergence)]


def names_of(loss_type: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the losses in the value of `loss_type`, also of another release."""
    return (loss_type,) if isinstance(loss_type, str) else tuple(loss_type or ())


def is_reference_free(loss_type: str | Sequence[str] | None) -> bool:
    """Return whether no loss in the value of `loss_type` reads a reference."""
    names = set(names_of(loss_type)) - {"sft"}
    return bool(names) and names <= set(REFERENCE_FREE)


class WithLosses(KtoKeys):
    """A config of a preference loss."""

    beta: Positive = option(
        0.1,
        "strength of the KL term (ipo: tau); a larger beta stays closer to the reference (DPO paper). Without a "
        "reference it is no price of KL: simpo, cpo: scale of the log-probabilities; orpo: lambda, the weight of the "
        "odds (TRL's names)",
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
    loss_type: Annotated[LossType | LossTypes, BeforeValidator(_losses)] = option(
        "sigmoid",
        "preference loss (docs/methods/preference.md): sigmoid (DPO paper); robust: sigmoid that corrects a share "
        "label_smoothing of flipped labels; hinge: ignores how much a response is preferred; ipo: squared, has another "
        "scale of beta (IPO paper); ipo_mean: the same on means over tokens (TRL's ipo), depends on lengths; "
        "sigmoid_norm: sigmoid on means (TRL); apo_zero: each response by itself, losers get probability 0; apo_down: "
        "has no minimum, needs early stopping; simpo, orpo, cpo: without a reference; plackett_luce: whole rankings "
        "without ties (DPO paper, A.3), has sigmoid's optimum for rankings from the Plackett-Luce model, rewards x .91 "
        "to .95 for others; kto, apo_zero_unpaired: responses labelled good or bad, or a pair as two "
        "(docs/methods/kto.md). Other losses read a ranking's untied pairs in one pass, each with weight 1 / their "
        "number (InstructGPT). A list is their sum with loss_weights; in it sft is an SFT loss on chosen responses",
        moves_optimum=True,
        neutral=("sigmoid", "robust", "plackett_luce"),
    )
    loss_weights: tuple[Positive, ...] | None = option(
        None, "weights of the losses in a list (default: 1 each, TRL)", moves_optimum=True
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
    simpo_gamma: NonNegative | None = option(
        None, "with simpo: the margin gamma that is asked for, after beta (default: .5, TRL)", moves_optimum=True
    )
    cpo_alpha: NonNegative | None = option(
        None, "with cpo: weight of the SFT loss on the chosen responses (default: 1, CPO paper)", moves_optimum=True
    )
    sft_weight: NonNegative = option(
        0.0,
        "weight of an SFT loss on the chosen responses, a mean over their tokens, beside the preference loss (RPO; "
        "ours: 0). orpo and cpo have one of their own",
        moves_optimum=True,
    )
    f_divergence: Divergence = option(
        "reverse_kl",
        "divergence from the reference that the reward is weighed against (DPO paper: reverse_kl; f-DPO paper); js: "
        "Jensen-Shannon; alpha: with f_alpha. For losses of a difference of rewards",
        moves_optimum=True,
    )
    f_alpha: float | None = option(
        None, "a of the alpha divergence, f'(t) = (t^(a - 1) - 1) / (a - 1) (default: .5, TRL)", moves_optimum=True
    )
    ld_alpha: Fraction | None = option(
        None,
        "weight of the tokens of a response beyond the length of the other one of its pair; 1: as all others "
        "(LD-DPO; TRL: 1). It turns precompute_ref_log_probs off",
        moves_optimum=True,
        neutral=(None, 1.0),
    )
    sync_ref_model: bool = option(
        False,
        "move the reference towards the policy every ref_model_sync_steps (TR-DPO; TRL: off). It turns "
        "precompute_ref_log_probs off; eval_* figures stay measured to the reference that the run begins with",
        moves_optimum=True,
    )
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] | None = option(
        None, "with sync_ref_model: share of the policy in the new reference (default: .6, TRL)", moves_optimum=True
    )
    ref_model_sync_steps: Count | None = option(
        None,
        "with sync_ref_model: steps from one move of the reference to the next (default: 512, TRL)",
        moves_optimum=True,
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

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the losses."""
        return names_of(self.loss_type)

    @property
    def losses(self) -> tuple[tuple[str, float], ...]:
        """The preference losses with their weights, without `sft`."""
        return tuple((name, weight) for name, weight in self._weighted if name != "sft")

    @property
    def _weighted(self) -> list[tuple[str, float]]:
        return list(zip(self.loss_names, self.loss_weights or (1.0,) * len(self.loss_names)))

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the log-probabilities of a reference."""
        return not is_reference_free(self.loss_type)

    @property
    def caches_reference(self) -> bool:
        """Whether the native loop computes the log-probabilities of the reference once, before training."""
        return self.precompute_ref_log_probs and self.ld_alpha is None and not self.sync_ref_model

    @property
    def mixup_alpha(self) -> float:
        """The share of the policy in a reference that is moved."""
        return 0.6 if self.ref_model_mixup_alpha is None else self.ref_model_mixup_alpha

    @property
    def sync_steps(self) -> int:
        """Steps from one move of the reference to the next."""
        return self.ref_model_sync_steps or 512

    @property
    def alpha(self) -> float:
        """a of the alpha divergence."""
        return 0.5 if self.f_alpha is None else self.f_alpha

    @property
    def gamma(self) -> float:
        """The margin that `simpo` asks for."""
        return 0.5 if self.simpo_gamma is None else self.simpo_gamma

    @property
    def sft_term(self) -> float:
        """The weight of the SFT loss on the chosen responses: `sft_weight`, and what the losses have of it."""
        own = {"orpo": 1.0, "cpo": 1.0 if self.cpo_alpha is None else self.cpo_alpha, "sft": 1.0}
        return self.sft_weight + sum(weight * own.get(name, 0.0) for name, weight in self._weighted)

    @property
    def population(self) -> bool:
        """Whether pairs are drawn from the built-in world at every step."""
        return self.dataset_name == "world:verdicts"
