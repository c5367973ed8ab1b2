"""Checks of the options of `rlhf dpo` that belong to some losses."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.config.losses import DIFFERENCES, REFERENCE_FREE, SMOOTHED, WithLosses
from rlhf_pipeline.config.sharding import OFF
from rlhf_pipeline.config.training import NATIVE
from rlhf_pipeline.errors import Fault

OWNERS = {"simpo_gamma": "simpo", "cpo_alpha": "cpo"}
"""Options that belong to one loss."""

TRL_LOSSES = "sigmoid, robust, hinge, ipo_mean, sigmoid_norm or apo_zero"


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
    others = [name for name in config.loss_names if name in (*REFERENCE_FREE, *UNPAIRED, "plackett_luce")]
    if config.ld_alpha is not None and others:
        found = f"ld_alpha {config.ld_alpha:g} with loss_type {others[0]}, which it is not defined for"
        yield Fault("ld_alpha", found, "no ld_alpha, or a loss on pairs with a reference")
    if config.ld_alpha is not None and config.population:
        found = f"{config.dataset_name}: fresh pairs come with log-probabilities of whole responses, with ld_alpha"
        yield Fault("dataset_name", found, "recorded pairs, or no ld_alpha")


def check_moving_reference(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of a reference that moves, where there is none of its own, and of its options without it."""
    if not config.sync_ref_model:
        for key in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if (value := getattr(config, key)) is not None:
                yield Fault(key, f"{key} {value:g} without sync_ref_model", f"no {key}, or sync_ref_model true")
        return
    if not config.needs_reference:
        found = f"found true with loss_type {_said(config)}, which has no reference"
        yield Fault("sync_ref_model", found, "false, or another loss_type")
    if set(config.loss_names) & set(UNPAIRED):
        found = f"found true with loss_type {_said(config)}, whose z0 is measured against a reference that stays"
        yield Fault("sync_ref_model", found, "false, or another loss_type")
    if config.use_peft:
        found = "found true with use_peft: the reference is the policy's own weights without the adapter"
        yield Fault("sync_ref_model", found, "false, or use_peft false")
    if config.fsdp:
        yield Fault("sync_ref_model", "found true with fsdp, which divides the weights of both models", "false", OFF)
    if config.population:
        found = f"{config.dataset_name}: fresh pairs are drawn from a reference that stays, with sync_ref_model"
        yield Fault("dataset_name", found, "recorded pairs, or sync_ref_model false")


def remark_on_flips(config: WithLosses) -> Iterator[str]:
    """Yield the note of robust DPO without a share of flipped labels."""
    if "robust" in config.loss_names and not config.label_smoothing:
        yield "loss_type robust without label_smoothing is sigmoid: label_smoothing is the share of flipped labels"


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


def check_margin(config: WithLosses) -> Iterator[Fault]:
    """Yield the faults of margins with a loss, labels or data that have none."""
    if not config.use_margin:
        return
    if config.loss_type != "sigmoid":
        found = f"found true with loss_type {_said(config)}, which defines no margin"
        yield Fault("use_margin", found, "use_margin false, or loss_type sigmoid")
    if config.soft_labels or config.label_smoothing:
        other = "soft_labels" if config.soft_labels else "label_smoothing"
        found = f"found true with {other}: a margin belongs to a label that is certain"
        yield Fault("use_margin", found, f"use_margin or {other}, not both")
    if config.population:
        yield Fault("use_margin", f"{config.dataset_name}: fresh pairs have no margin", "false, or recorded pairs")
    if config.engine == "trl":
        yield Fault("use_margin", "TRL's DPOTrainer reads no margin", "false", NATIVE)


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
