"""Keys of `rlhf dpo` for the losses on single responses, each labelled good or bad (KTO)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from rlhf_pipeline.config.base import Positive, option, spelled
from rlhf_pipeline.config.sharding import OFF
from rlhf_pipeline.config.training import NATIVE, TrainingConfig
from rlhf_pipeline.errors import Fault

KTO = "kto"
UNPAIRED = (KTO, "apo_zero_unpaired")
"""The values of `loss_type` that read single responses; a pair is a desirable one and an undesirable one."""


class KtoKeys(TrainingConfig):
    """The keys of these losses, a part of the config of `rlhf dpo`."""

    desirable_weight: Positive = option(
        1.0, "with kto and apo_zero_unpaired: weight of the loss of desirable responses (TRL)"
    )
    undesirable_weight: Positive = option(
        1.0, "with kto and apo_zero_unpaired: weight of the loss of undesirable responses (TRL)"
    )
    kto_kl: Literal["mismatched", "sampled"] = option(
        "mismatched",
        "with kto: responses whose mean log pi / pi_ref is z0, at least 0, once for each optimizer step; mismatched: "
        "each prompt with the response to another one (KTO paper; TRL, which does not look whether it is another one), "
        "no estimate of a KL, 0 once the policy has left these responses; sampled: one response of the policy to each "
        "prompt, which estimates the KL that the "
        "paper defines (costs a rollout)",
    )


class HasKto(Protocol):
    """A config with these keys, and the keys that they depend on."""

    @property
    def loss_type(self) -> Any: ...
    @property
    def sft_weight(self) -> float: ...
    @property
    def desirable_weight(self) -> float: ...
    @property
    def undesirable_weight(self) -> float: ...
    @property
    def kto_kl(self) -> str: ...
    @property
    def soft_labels(self) -> bool: ...
    @property
    def population(self) -> bool: ...
    @property
    def engine(self) -> str: ...
    @property
    def fsdp(self) -> bool: ...
    @property
    def per_device_train_batch_size(self) -> int: ...
    @property
    def gradient_accumulation_steps(self) -> int | None: ...


def check_kto(config: HasKto) -> Iterator[Fault]:
    """Yield the faults of keys of these losses with another loss, and of other keys with these losses."""
    loss, window = config.loss_type, config.per_device_train_batch_size * (config.gradient_accumulation_steps or 1)
    for key, losses in (("desirable_weight", UNPAIRED), ("undesirable_weight", UNPAIRED), ("kto_kl", (KTO,))):
        value = getattr(config, key)
        if value != KtoKeys.model_fields[key].default and loss not in losses:
            found = f"found {value} with loss_type {spelled(loss)}, which does not read it"
            yield Fault(key, found, f"loss_type {losses[0]}")
    if loss not in UNPAIRED:
        return
    if config.soft_labels:
        yield Fault("soft_labels", f"found true with loss_type {loss}, whose labels are good or bad", "false")
    if config.sft_weight:
        found = f"found {config.sft_weight:g} with loss_type {loss}, which reads single responses"
        yield Fault("sft_weight", found, "0, or a loss on pairs")
    if config.population:
        found = f"found {loss!r}, but world:verdicts draws pairs with label probabilities"
        yield Fault("loss_type", found, "recorded pairs or labelled responses, or another loss_type")
    if config.engine == "trl":
        yield Fault("loss_type", f"found {loss!r}, but engine trl runs only TRL's DPOTrainer", "another one", NATIVE)
    if config.kto_kl == "sampled" and config.fsdp:
        yield Fault("kto_kl", "found 'sampled' with fsdp, but only a whole policy can sample", "'mismatched'", OFF)
    if loss == KTO and config.kto_kl == "mismatched" and window == 1:
        found = "found 1: a step of one response has no other prompt to set it against, which z0 needs"
        yield Fault("per_device_train_batch_size", found, "2 or more, or kto_kl 'sampled'")
