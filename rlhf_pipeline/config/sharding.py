"""The key that divides a model between processes, and its checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import option, wrong
from rlhf_pipeline.config.evaluation import WithEvaluation
from rlhf_pipeline.errors import Fault

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "lion", "lion_32bit", "sgd", "rmsprop", "adagrad")
"""Optimizers whose step treats each entry of a weight by itself, so that a part of a weight is enough."""
OFF = "or fsdp: false"


def _full_shard(value: Any) -> Any:
    """Read transformers' words for it: `full_shard`, `full_shard auto_wrap`, or no text for false."""
    words = value.split() if isinstance(value, str) else value
    if isinstance(words, list) and all(word in ("full_shard", "auto_wrap", "true", "false") for word in words):
        return "full_shard" in words or words == ["true"]
    if isinstance(value, bool):
        return value
    raise wrong("true or false (full_shard means true; shard_grad_op is true with fsdp_reshard_after_forward: false)")


class WithSharding(WithEvaluation):
    """A config of a stage whose weights can be divided."""

    fsdp: Annotated[bool, BeforeValidator(_full_shard)] = option(
        False,
        "divide weights, gradients and optimizer state between the processes of a stage (PyTorch's FSDP2), for models "
        "that do not fit on one GPU; with one process it has no effect (transformers: off)",
    )
    fsdp_reshard_after_forward: bool = option(
        True,
        "with fsdp: drop gathered weights after a forward pass and gather them again for the backward pass, as ZeRO-3 "
        "does; false keeps them until the backward pass, as ZeRO-2 does: less communication, more memory (accelerate)",
    )


class HasSharding(Protocol):
    """A config with the key, and the keys that it depends on."""

    @property
    def stage(self) -> str: ...
    @property
    def fsdp(self) -> bool: ...
    @property
    def engine(self) -> Literal["native", "trl"]: ...
    @property
    def optim(self) -> str: ...
    @property
    def micro_batch_tokens(self) -> int | None: ...
    @property
    def load_in_4bit(self) -> bool: ...
    @property
    def attn_implementation(self) -> str | None: ...


def check_sharding(config: HasSharding) -> Iterator[Fault]:
    """Yield the faults of `fsdp` with what needs whole weights."""
    if not config.fsdp:
        return
    if config.stage == "ppo" and config.micro_batch_tokens is not None:
        found = f"found {config.micro_batch_tokens} with fsdp, whose processes must score equally many micro-batches"
        yield Fault("micro_batch_tokens", found, "no micro_batch_tokens", OFF)
    if config.engine == "trl":
        yield Fault("engine", "found 'trl' with fsdp, which only the native loop has", "'native'", OFF)
    if config.load_in_4bit:
        yield Fault("load_in_4bit", "weights in 4 bits cannot be divided by fsdp", "false", OFF)
    if config.optim not in OPTIMIZERS:
        found = f"found {config.optim!r}, whose step needs whole weights, with fsdp"
        yield Fault("optim", found, f"one of {', '.join(OPTIMIZERS)}", OFF)
    if config.attn_implementation not in (None, "eager", "sdpa"):
        found = f"found {config.attn_implementation!r} with fsdp, which checks a model on the CPU before it divides it"
        yield Fault("attn_implementation", found, "sdpa, eager, or no value", OFF)
