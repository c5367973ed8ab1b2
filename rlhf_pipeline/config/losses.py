"""The losses of `rlhf dpo` by name, and the checks of the options that belong to some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import Fraction, NonNegative, Positive, Text, option, wrong
from rlhf_pipeline.config.training import NATIVE, TrainingConfig
from rlhf_pipeline.errors import Fault, did_you_mean

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
]
LossTypes = tuple[LossType | Literal["sft"], ...]
SMOOTHED = ("sigmoid", "robust")
"""The losses that define `label_smoothing`."""

REFERENCE_FREE = ("simpo", "orpo", "cpo")
"""The losses that compute no reference: their beta is no price of KL."""

DIFFERENCES = ("sigmoid", "robust", "hinge", "ipo", "ipo_mean", "sigmoid_norm")
"""The losses of a difference of rewards, in which the constant of another divergence cancels."""

OWNERS = {"simpo_gamma": "simpo", "cpo_alpha": "cpo"}
"""Options that belong to one loss."""

TRL_LOSSES = "sigmoid, robust, hinge, ipo_mean, sigmoid_norm or apo_zero"


def _losses(value: Any) -> Any:
    """Return the name of a loss, or a tuple of several; TRL writes one in a list too."""
    names = get_args(LossType)
    value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if not isinstance(value, list | tuple):
        if value not in names:
            raise wrong(f"one of {', '.join(names)}", did_you_mean(str(value), names))
        return value
    if not all(isinstance(name, str) and name in (*names, "sft") for name in value):
        raise wrong(f"names among {', '.join(names)} and sft")
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


class WithLosses(TrainingConfig):
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
        "to .95 for others. Other losses read a ranking's untied pairs in one pass, each with weight 1 / their number "
        "(InstructGPT). A list is their sum with loss_weights; in it sft is the SFT loss on the chosen responses",
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
    soft_labels: bool = option(
        False, "train on the recorded label_probability instead of the drawn label; same optimum (ours: off)"
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
        return self.precompute_ref_log_probs and self.ld_alpha is None

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


def check_weights(config: WithLosses) -> Iterator[Fault]:
    """Yield the fault of weights that do not belong to a list of losses."""
    given, count = config.loss_weights, len(config.loss_names)
    if given is not None and count == 1:
        yield Fault(
            "loss_weights", f"found weights with loss_type {_said(config)}", "no loss_weights, or a list of losses"
        )
    elif given is not None and len(given) != count:
        yield Fault("loss_weights", f"{len(given)} weights for {count} losses", f"{count} weights, one for each loss")


def _said(config: WithLosses) -> str:
    return ", ".join(config.loss_names)


def check_owned(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of options with a loss that does not define them."""
    if config.label_smoothing and not set(config.loss_names) & set(SMOOTHED):
        found = f"label_smoothing {config.label_smoothing:g} with loss_type {_said(config)}"
        yield Fault("label_smoothing", found, f"label_smoothing 0, or loss_type {' or '.join(SMOOTHED)}")
    for key, owner in OWNERS.items():
        value = getattr(config, key)
        if value is not None and owner not in config.loss_names:
            found = f"{key} {value:g} with loss_type {_said(config)}"
            yield Fault(key, found, f"no {key}, or loss_type {owner}")


def check_divergence(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of a divergence with a loss in which its constant does not cancel, and of an idle f_alpha."""
    others = [name for name in config.loss_names if name not in (*DIFFERENCES, "sft")]
    if config.f_divergence != "reverse_kl" and others:
        found = f"found {config.f_divergence!r} with loss_type {others[0]}, which is no loss of a difference of rewards"
        yield Fault(
            "f_divergence", found, f"reverse_kl, or loss_type {', '.join(DIFFERENCES[:-1])} or {DIFFERENCES[-1]}"
        )
    if config.f_alpha is not None and config.f_divergence != "alpha":
        found = f"f_alpha {config.f_alpha:g} with f_divergence {config.f_divergence}"
        yield Fault("f_alpha", found, "no f_alpha, or f_divergence alpha")


def check_shared_length(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of `ld_alpha` without pairs of whole responses, or without a reference."""
    others = [name for name in config.loss_names if name in (*REFERENCE_FREE, "plackett_luce")]
    if config.ld_alpha is not None and others:
        found = f"ld_alpha {config.ld_alpha:g} with loss_type {others[0]}, which it is not defined for"
        yield Fault("ld_alpha", found, "no ld_alpha, or a loss on pairs with a reference")
    if config.ld_alpha is not None and config.population:
        found = f"{config.dataset_name}: fresh pairs come with log-probabilities of whole responses, with ld_alpha"
        yield Fault("dataset_name", found, "recorded pairs, or no ld_alpha")


def check_minimum(config: WithLosses) -> Iterator[Fault]:
    """Yield the fault of a loss without a minimum in a run that nothing stops."""
    stops = config.early_stopping_patience is not None or config.load_best_model_at_end
    if "apo_down" in config.loss_names and config.engine == "native" and not stops:
        found = "found 'apo_down', which has no minimum: it falls until one response has all the probability"
        fix = "or apo_zero, which raises the chosen response"
        yield Fault("loss_type", found, "early_stopping_patience or load_best_model_at_end beside it", fix)


def check_reference_free(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of a reference beside a loss that has none."""
    if config.needs_reference:
        return
    if config.ref_model is not None:
        found = f"found {config.ref_model!r} with loss_type {_said(config)}, which has no reference"
        yield Fault("ref_model", found, "no ref_model, or another loss_type")
    if config.population:
        found = f"{config.dataset_name}: fresh pairs are drawn from the reference, and {_said(config)} has none"
        yield Fault("dataset_name", found, "recorded pairs, or loss_type sigmoid")


def check_chosen(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of a loss on the chosen responses where labels are probabilities, which choose none."""
    if not config.sft_term:
        return
    key = "loss_type" if config.sft_term != config.sft_weight else "sft_weight"
    value = _said(config) if key == "loss_type" else f"{config.sft_weight:g}"
    if config.soft_labels:
        found = f"found {value} with soft_labels: it trains on the chosen responses, and probabilities choose none"
        yield Fault(key, found, "soft_labels false")
    if config.population and config.needs_reference:
        found = f"found {value}, but {config.dataset_name} draws pairs with label probabilities, which choose none"
        yield Fault(key, found, "recorded pairs")


def check_ranking_loss(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of a loss on rankings with label probabilities, which only pairs have."""
    if "plackett_luce" not in config.loss_names:
        return
    if config.soft_labels:
        fix = "soft_labels false, or loss_type sigmoid"
        yield Fault("soft_labels", "found true with loss_type plackett_luce, which uses no label probabilities", fix)
    if config.population:
        found = f"found 'plackett_luce', but {config.dataset_name} draws pairs with label probabilities"
        yield Fault("loss_type", found, "'sigmoid', which is the same loss on pairs")


_NOT_IN_TRL = {
    "ipo": "TRL has no ipo on summed log-probabilities: its 'ipo' averages them over each response's tokens",
    "plackett_luce": "found 'plackett_luce', but TRL's trainer accepts only pairs and splits rankings into pairs",
    "apo_down": "found 'apo_down', which must be stopped early: engine trl keeps no weights of evaluations",
    **{
        name: f"found {name!r}, which TRL's DPOTrainer does not have (its experimental trainers read texts, not tokens)"
        for name in REFERENCE_FREE
    },
}


def check_trl_losses(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of losses that `engine: trl` does not have, or computes differently."""
    if config.engine != "trl":
        return
    for name in config.loss_names:
        if name in _NOT_IN_TRL:
            yield Fault("loss_type", _NOT_IN_TRL[name], TRL_LOSSES, NATIVE)
    if config.label_smoothing and "sigmoid" in config.loss_names:
        found = f"found {config.label_smoothing:g}, which TRL's sigmoid loss ignores silently"
        yield Fault("label_smoothing", found, "0", NATIVE)
