"""Windows: the data of one optimizer step.

SFT, the reward model and DPO draw windows from a sampler; a generator of rollouts yields those of PPO.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import Layout, PackedBatch, micro_batches, pack
from rlhf_pipeline.data.comparisons import Comparisons, compare
from rlhf_pipeline.data.tokenize import Example


@dataclass
class Window:
    """One optimizer step: its micro-batches on this rank, and the denominators over all ranks.

    counts: denominators by name ("tokens", "pairs", "prompts", "sequences", ...), over the whole window and all ranks,
        known before the first backward pass.
    ends_update: whether the learning-rate schedule steps and metrics are logged after this window. Always true, except
        in PPO, where only the last minibatch of a rollout ends an update.
    metrics: metrics that are already known (of a rollout), logged with the update.
    halvings: how often its micro-batches have already been halved for lack of memory.
    members: the numbers of its examples on all ranks, in the order in which they were drawn.
    """

    micro_batches: Sequence[Any]
    counts: dict[str, float]
    ends_update: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: float = 0.0
    halvings: int = 0
    members: Sequence[int] = ()


@dataclass
class Loss:
    """The loss of one micro-batch: SUMS, each with the name of its denominator.

    terms: name -> (sum, denominator, weight); the loss is sum_i weight_i * sum_i / count[denominator_i].
    metrics: name -> (sum, denominator), detached.
    checked: the tensors in the loss, which must be finite, named in the plural: per token (N,), per completion (C,) or
        (C, R).
    """

    terms: dict[str, tuple[Tensor, str, float]]
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    checked: Mapping[str, Tensor] = field(default_factory=dict)

    def total(self, counts: Mapping[str, float]) -> Tensor:
        """The share of the window's loss: sum_i weight_i * sum_i / count[denominator_i]."""
        return sum(weight * value / counts[name] for value, name, weight in self.terms.values())  # type: ignore[return-value]


@dataclass(frozen=True)
class PairFacts:
    """Exact facts of P pairs.

    ref_logprobs: (P, 2) log-probabilities of chosen and rejected under the reference, in nats.
    target: (P,) probability that the chosen response is preferred.
    """

    ref_logprobs: Tensor
    target: Tensor

    def part(self, rows: slice) -> PairFacts:
        return PairFacts(self.ref_logprobs[rows], self.target[rows])


Pack = Callable[[Sequence[Example]], PackedBatch]


@dataclass(frozen=True)
class ExampleBatch:
    """Packed examples and their indices in the data set (for cached reference log-probabilities).

    facts: exact facts of pairs that are drawn at every step; such pairs have no index in a data set.
    compared: the preferences among the completions; None: chosen and rejected alternate (or there are none).
    examples, pack: the examples of `batch` and the function that packed them; needed to cut the batch and to name its
        examples in an error.
    """

    batch: PackedBatch
    indices: list[int]
    weight: float = 1.0  # 0 for a placeholder on a rank without an example in this window
    facts: PairFacts | None = None
    compared: Comparisons | None = None
    examples: Sequence[Example] = ()
    pack: Pack | None = None

    def part(self, rows: slice) -> ExampleBatch:
        """Some of its examples as a micro-batch."""
        assert self.pack is not None
        examples = self.examples[rows]
        batch = self.pack(examples)
        return replace(
            self,
            batch=batch,
            indices=self.indices[rows],
            facts=None if self.facts is None else self.facts.part(rows),
            compared=compare(examples, batch.lengths.device),
            examples=examples,
        )


def cut_micro_batches(micro_batches: Sequence[Any], halvings: int) -> Iterator[Any]:
    """The micro-batches of a window, each halved `halvings` times (models/memory.py); trees are not cut."""
    for micro_batch in micro_batches:
        cut = pieces(size_of(micro_batch), halvings)
        yield from [micro_batch] if len(cut) == 1 else (micro_batch.part(piece) for piece in cut)


def size_of(micro_batch: Any) -> int:
    """The number of examples that a micro-batch can be cut into."""
    return len(getattr(micro_batch, "examples", ())) or 1


def pieces(count: int, halvings: int) -> list[slice]:
    """The slices of `count` items after `halvings` halvings, the larger half first; a single item is not cut."""
    cut = [slice(0, count)]
    for _ in range(halvings):
        cut = [half for whole in cut for half in _halves(whole)]
    return cut


def _halves(whole: slice) -> list[slice]:
    middle = (whole.start + whole.stop + 1) // 2
    return [whole] if middle == whole.stop else [slice(whole.start, middle), slice(middle, whole.stop)]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in one epoch; it depends only on seed and epoch, so resuming needs no state."""
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


def counts_of(examples: Sequence[Example]) -> dict[str, float]:
    """The denominators of a window of examples: its prompts, their untied pairs, its trained tokens.

    "chosen_tokens" are those of the first completion of each example.
    """
    return {
        "prompts": float(len(examples)),
        "pairs": float(sum(len(example.untied()) for example in examples)),
        "tokens": float(sum(example.tokens_trained for example in examples)),
        "chosen_tokens": float(sum(len(example.completions[0]) for example in examples)),
    }


def example_windows(
    examples: Sequence[Example],
    *,
    steps: int,
    micro_batch_size: int,
    accumulation: int,
    seed: int,
    layout: Layout = "trees",
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shares: int | None = None,
    device: torch.device | str = "cpu",
    micro_batch_tokens: int | None = None,
    bins: Sequence[Sequence[int]] | None = None,
    bin_tokens: int = 0,
    size: int | None = None,
) -> Iterator[Window]:
    """Windows of `size` examples, by default micro_batch_size x accumulation x shares, shuffled in each epoch.

    The examples of a window depend only on seed, window size and step. Within a window, examples are grouped by length;
    `micro_batch_tokens` limits the tokens of a micro-batch. With `bins` (indices of examples that fill `bin_tokens`
    tokens together), a window has as many bins in place of examples. shares: `Run.shares`.
    """

    def packed(chosen: Sequence[Example]) -> PackedBatch:
        return pack(chosen, layout=layout).to(device)

    size = size or micro_batch_size * accumulation * (shares or world_size)
    units = len(examples) if bins is None else len(bins)
    most = micro_batch_size
    if bins is not None:
        most, whole = len(examples), bin_tokens * micro_batch_size
        micro_batch_tokens = min(whole, micro_batch_tokens or whole)
    per_epoch = steps_per_epoch(units, size)
    epoch, order = -1, []
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = epoch_order(units, seed, epoch)
        place = step % per_epoch
        members = [(unit,) if bins is None else bins[unit] for unit in order[place * size : (place + 1) * size]]
        every = list(chain.from_iterable(members))
        made = {index: examples[index] for index in every}
        counts = counts_of([made[index] for index in every])
        mine = list(chain.from_iterable(members[rank::world_size]))
        weight = 1.0
        if not mine:  # fewer examples than ranks: every rank must take part in the backward pass
            mine, weight = list(members[0]), 0.0
        chosen = [made[index] for index in mine]
        batches = []
        for group in micro_batches(chosen, most, micro_batch_tokens):
            grouped = [chosen[i] for i in group]
            numbers = [mine[i] for i in group]
            compared = compare(grouped, device)
            batches.append(
                ExampleBatch(packed(grouped), numbers, weight, compared=compared, examples=grouped, pack=packed)
            )
        yield Window(batches, counts, epoch=(step + 1) / per_epoch, members=every)
