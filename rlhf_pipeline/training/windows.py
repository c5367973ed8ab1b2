"""Windows: what one optimizer step trains on.

SFT, the reward model and DPO draw windows from a sampler; PPO's are yielded by a generator of rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import Layout, PackedBatch, micro_batches, pack
from rlhf_pipeline.data.tokenize import Example


@dataclass
class Window:
    """One optimizer step: its micro-batches on this rank, and the denominators over all ranks.

    counts: by name ("tokens", "pairs", "prompts", "sequences", ...), over the whole window and all ranks, known
        before the first backward pass.
    ends_update: whether the learning-rate schedule steps and metrics are logged after it. Always, but in PPO,
        where only the last minibatch of a rollout ends an update.
    metrics: figures that are known already (of a rollout), logged with the update.
    """

    micro_batches: Sequence[Any]
    counts: dict[str, float]
    ends_update: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: float = 0.0


@dataclass
class Loss:
    """What a step returns for one micro-batch: SUMS, each with the name of its denominator.

    terms: name -> (sum, denominator, weight); the loss is sum_i weight_i * sum_i / count[denominator_i].
    metrics: name -> (sum, denominator), detached.
    """

    terms: dict[str, tuple[Tensor, str, float]]
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class PairFacts:
    """What is known exactly of P pairs. ref_logprobs: (P, 2) of chosen and rejected; target: (P,) the probability
    that the chosen response is preferred."""

    ref_logprobs: Tensor
    target: Tensor


@dataclass(frozen=True)
class ExampleBatch:
    """Packed examples and their numbers in the data set (for cached reference log-probabilities).

    facts: what the source of pairs that are drawn anew at every step knows about them, in place of numbers.
    """

    batch: PackedBatch
    indices: list[int]
    weight: float = 1.0  # 0 for a stand-in on a rank that has no example in this window
    facts: PairFacts | None = None


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in one epoch: a function of seed and epoch alone, so resuming needs no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def steps_per_epoch(count: int, window_size: int) -> int:
    """Optimizer steps of one epoch; the last window may be smaller."""
    return math.ceil(count / window_size)


def total_steps(count: int, window_size: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run: `max_steps` if positive, else `epochs` rounded up to whole steps."""
    if max_steps > 0:
        return max_steps
    return max(1, math.ceil(epochs * steps_per_epoch(count, window_size) - 1e-9))


def example_windows(
    examples: Sequence[Example],
    *,
    steps: int,
    micro_batch_size: int,
    accumulation: int,
    seed: int,
    pad_id: int,
    layout: Layout = "trees",
    count: Callable[[Example], dict[str, float]],
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    micro_batch_tokens: int | None = None,
) -> Iterator[Window]:
    """Windows of micro_batch_size x accumulation x world_size examples, shuffled anew each epoch.

    Which examples make up a window depends on seed, window size and step alone; within it they are grouped by length
    and, with `micro_batch_tokens`, cut where a micro-batch would hold more tokens. `count(example)` gives what an
    example contributes to the denominators.
    """
    size = micro_batch_size * accumulation * world_size
    per_epoch = steps_per_epoch(len(examples), size)
    epoch, order = -1, []
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = epoch_order(len(examples), seed, epoch)
        place = step % per_epoch
        members = order[place * size : (place + 1) * size]
        counts: dict[str, float] = {}
        for index in members:
            for name, value in count(examples[index]).items():
                counts[name] = counts.get(name, 0.0) + value
        mine = members[rank::world_size]
        weight = 1.0
        if not mine:  # fewer examples than ranks: every rank must take part in the backward pass
            mine, weight = members[:1], 0.0
        chosen = [examples[index] for index in mine]
        batches = []
        for group in micro_batches(chosen, micro_batch_size, micro_batch_tokens):
            batch = pack([chosen[i] for i in group], pad_id, layout=layout).to(device)
            batches.append(ExampleBatch(batch, [mine[i] for i in group], weight))
        yield Window(batches, counts, epoch=(step + 1) / per_epoch)
