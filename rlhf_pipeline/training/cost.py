"""The cost of a run: time, floating-point operations, tokens, optimizer steps, peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rlhf_pipeline.data.batch import Counted, PackedBatch
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.forward import trunk_of
from rlhf_pipeline.models.four_bits import entries
from rlhf_pipeline.models.last_layer import skipping_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the FLOP formula needs.

    matmul, head: weights in matrix products of the trunk and the output head. attention: layers x query width.
    skipped: weights that are used only at positions whose hidden states are read (models/last_layer.py). reads: these
    positions: those that predict a completion's token, the completion's tokens, or the last token of each completion.
    recomputed: weights whose products the backward pass computes again (`gradient_checkpointing`); otherwise 0.
    frozen, frozen_head, frozen_skipped: those of `matmul`, `head` and `skipped` that take no gradient when the model
    trains: the weights below an adapter.
    """

    matmul: int
    head: int
    attention: int
    skipped: int = 0
    reads: Literal["predicting", "tokens", "last"] = "predicting"
    recomputed: int = 0
    frozen: int = 0
    frozen_head: int = 0
    frozen_skipped: int = 0

    @staticmethod
    def of(model: PreTrainedModel, *, head: bool = True, checkpointed: bool = False) -> ModelShape:
        """The shape of a transformers model; head=False for a sequence classifier or a bare trunk.

        checkpointed: whether it trains with `gradient_checkpointing`; its last layer then computes every position.
        """
        trunk = trunk_of(model)
        embeddings = {id(module.weight) for module in trunk.modules() if isinstance(module, nn.Embedding)}
        weights = [p for p in _computed(trunk) if p.ndim == 2 and id(p) not in embeddings]
        config: Any = trunk.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
        output = model.get_output_embeddings() if head and hasattr(model, "get_output_embeddings") else None
        skipped = [p for module in skipping_modules(trunk) for p in _computed(module) if p.ndim == 2]
        head_weights = [] if output is None else [p for p in _computed(output) if p.ndim == 2]
        classifier = not head and (hasattr(model, "score") or hasattr(model, "classifier"))
        mean = getattr(trunk.config, "score_pooling", None) == "mean"
        pooled: Literal["tokens", "last"] = "tokens" if mean else "last"
        return ModelShape(
            _sizes(weights),
            _sizes(head_weights),
            config.num_hidden_layers * width,
            _sizes(skipped),
            pooled if classifier else "predicting",
            _recomputed_weights(trunk) if checkpointed else 0,
            *(_sizes(p for p in part if not p.requires_grad) for part in (weights, head_weights, skipped)),
        )

    def forward_flops(self, tokens: int, context_tokens: int, head_tokens: int, read: int | None = None) -> float:
        """FLOPs of a forward pass.

            2 N_matmul tokens + 4 layers d_attn sum(context) + 2 N_head head_tokens - 2 N_skipped (tokens - read)

        read: the number of positions read; None: all, so the last term is 0. Source: Kaplan et al. 2020, table 1, with
        the attention term summed over the actual context and the output head counted only where it is computed.
        """
        unread = 0 if read is None else tokens - read
        matmul = self.matmul * tokens - self.skipped * unread
        return 2.0 * matmul + 4.0 * self.attention * context_tokens + 2.0 * self.head * head_tokens

    def training_flops(self, tokens: int, context_tokens: int, head_tokens: int, read: int | None = None) -> float:
        """FLOPs of a forward and a backward pass: three times a forward pass, without the gradients of frozen weights.

        These would be 2 N_frozen tokens, counted as in `forward_flops`; gradients of activations pass through them.
        With `gradient_checkpointing`, plus 2 N_recomputed tokens + 4 layers d_attn sum(context) for the layers that are
        computed again.
        """
        again = 2.0 * self.recomputed * tokens + 4.0 * self.attention * context_tokens if self.recomputed else 0.0
        unread = 0 if read is None else tokens - read
        spared = self.frozen * tokens - self.frozen_skipped * unread + self.frozen_head * head_tokens
        return 3.0 * self.forward_flops(tokens, context_tokens, head_tokens, read) - 2.0 * spared + again

    def batch_counts(self, batch: PackedBatch | Counted) -> tuple[int, int, int, int | None]:
        """The arguments of `forward_flops` and `training_flops` for a packed batch, or for counts of examples."""
        read = {"predicting": batch.num_predicting, "tokens": batch.num_tokens, "last": batch.num_completions}
        where = None if self.recomputed else read[self.reads]
        return batch.active_tokens, batch.context_tokens, batch.num_tokens, where

    def batch_flops(self, batch: PackedBatch | Counted) -> float:
        """FLOPs of a forward pass over a packed batch, or over counted examples."""
        return self.forward_flops(*self.batch_counts(batch))

    def decode_flops(
        self, prompt_lengths: list[int], response_lengths: list[int], prompts: list[int] | None = None
    ) -> float:
        """FLOPs of cached sampling: the prompts, then one token at a time over its actual context.

        prompts: lengths of the prompts that are run, if responses to one prompt share it; only the last token of each
        is then read. None: each response runs its own prompt, and every position is read.
        """
        total = 0.0
        for prompt in prompt_lengths if prompts is None else prompts:
            total += self.forward_flops(prompt, prompt * (prompt + 1) // 2, 0, None if prompts is None else 1)
        for prompt, response in zip(prompt_lengths, response_lengths, strict=True):
            fed = response - 1  # the last sampled token is never fed back
            total += self.forward_flops(fed, fed * prompt + fed * (fed + 1) // 2, response)
        return total


def _computed(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that its forward pass uses: not those that an adapter has replaced by a copy."""
    return [p for name, p in module.named_parameters() if "original_module" not in name.split(".")]


def _sizes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(map(entries, parameters))


def _recomputed_weights(trunk: nn.Module) -> int:
    """Weights of the layers that `gradient_checkpointing` computes again.

    The backward pass stops the recomputation of a layer once it has every saved tensor. So the last product of a layer
    is not computed again, unless a norm reads its result.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    total = 0
    for layer in (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)):
        sizes = [entries(parameter) for parameter in layer.parameters() if parameter.ndim == 2]
        normed = any(name in ("post_feedforward_layernorm", "post_mlp_layernorm") for name, _ in layer.named_children())
        total += sum(sizes if normed else sizes[:-1])
    return total


COUNTS = ("flops", "tokens_trained", "tokens_generated", "optimizer_steps")
"""The counters of a `CostMeter`."""
PHASES = ("generation", "scoring", "update")
"""The phases of a PPO update."""
JUDGE = "judge"
"""The name of the judge's part of a run's time."""


def reset_peak_memory() -> None:
    """Reset the peak memory, so that each stage in a process has its own peak.

    If the system does not support the reset, the peak remains that of the whole process.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    # Not Linux, or not permitted: the peak remains that of the process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Peak resident memory of this process since the last reset, or peak allocated memory of the accelerator."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@dataclass
class CostMeter:
    """Running totals; `seconds` holds the wall time of named parts, `at_step` the cost at each snapshot.

    A judge is not a part of training: its FLOPs and seconds (the part JUDGE) are counted separately.
    """

    flops: float = 0.0
    tokens_trained: int = 0
    tokens_generated: int = 0
    optimizer_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    earlier_seconds: float = 0.0  # before a resume, including the judge's
    judge_flops: float = 0.0  # of all ranks
    at_step: dict[str, dict[str, float]] = field(default_factory=dict)  # keys are steps as text, as in JSON

    def train(self, shape: ModelShape, batch: PackedBatch) -> None:
        """Count a training pass (forward and backward) of one model."""
        self.flops += shape.training_flops(*shape.batch_counts(batch))

    def count(self, flops: float) -> None:
        """Count the forward pass of a frozen model that reads another input than packed batches."""
        self.flops += flops

    def count_judge(self, flops: float) -> None:
        """Count a forward pass of a judge."""
        self.judge_flops += flops

    def score(self, shape: ModelShape, batch: PackedBatch) -> None:
        """Count a forward pass of a frozen model."""
        self.flops += shape.batch_flops(batch)

    def generate(self, shape: ModelShape, sampled: Sequence[Example], prompts: list[int] | None = None) -> None:
        """Count the sampled responses of some examples; see `ModelShape.decode_flops`."""
        prompt_lengths = [len(example.prompt_ids) for example in sampled for _ in example.completions]
        response_lengths = [len(ids) for example in sampled for ids in example.completions]
        self.flops += shape.decode_flops(prompt_lengths, response_lengths, prompts)
        self.tokens_generated += sum(response_lengths)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context that adds its wall time to a named part."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def shares(self) -> dict[str, float]:
        """The share of each phase in PPO's time; {} for other stages.

        The phase "update" includes evaluation, snapshots and checkpoints after the update.
        """
        spent = {name: self.seconds[name] for name in PHASES if name in self.seconds}
        total = sum(spent.values())
        return {name: value / total for name, value in spent.items()} if len(spent) == len(PHASES) and total else {}

    def wall_seconds(self) -> float:
        """Seconds since the start, including those before a resume, without those of the judge."""
        return self.earlier_seconds + time.perf_counter() - self.started - self.seconds.get(JUDGE, 0.0)

    def mark(self, step: int, **counts: float) -> None:
        """Store the cost of the run up to a step; `counts` replaces totals of this meter."""
        self.at_step[str(step)] = {"wall_seconds": round(self.wall_seconds(), 3)} | self.counts() | counts

    def counts(self) -> dict[str, Any]:
        """The counters by name."""
        return {name: getattr(self, name) for name in COUNTS}

    def report(self) -> dict[str, Any]:
        """The `cost` of a manifest."""
        cost: dict[str, Any] = {
            "wall_seconds": round(self.wall_seconds(), 3),
            **self.counts(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if self.seconds:
            cost["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}
        if shares := self.shares():
            cost["shares"] = {name: round(value, 4) for name, value in shares.items()}
        if JUDGE in self.seconds:
            cost["judge_flops"] = self.judge_flops
        if self.at_step:
            cost["at_step"] = self.at_step
        return cost
