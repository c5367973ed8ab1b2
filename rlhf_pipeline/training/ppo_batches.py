"""The data of PPO's steps: sampled responses, the scored rollout, its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import Tensor, nn

from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.rollout.rollout import Rollout
from rlhf_pipeline.training.finite import BadRow, NotFinite, all_finite, bad_places, broken_weights
from rlhf_pipeline.training.windows import Pack, pieces

Minibatches = list[list[list[int]]]
"""The minibatches of an epoch, each a list of micro-batches, each a list of row numbers of the rollout."""


@dataclass(frozen=True)
class Sampled:
    """Sampled responses. logprobs: (C, R), those of the engine that sampled; None: the policy itself sampled."""

    examples: list[Example]
    logprobs: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """The scored rollout of an update.

    first: the packed micro-batches of the first epoch. halvings: the number of halvings of all micro-batches. told:
    metrics of the scale of its scores.
    """

    update: int
    rollout: Rollout
    epochs: list[Minibatches]
    first: list[list[PackedBatch]]
    halvings: int
    told: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[list[int]]:
        """The row numbers of each packed micro-batch."""
        return list(chain.from_iterable(self.epochs[0]))

    @property
    def packed(self) -> list[PackedBatch]:
        return list(chain.from_iterable(self.first))

    def require_finite(
        self, named: Mapping[str, Tensor], model: nn.Module, details: Mapping[str, str] | None = None
    ) -> None:
        """Check (C,) or (C, R) figures in the order of their computation.

        Args:
            details: text for the error, by the name of a figure.

        Raises:
            NotFinite: a figure is not finite; the error names the first one.
        """
        if bool(all_finite(named.values())):
            return
        holder = {row: number for number, rows in enumerate(self.rows) for row in rows}
        examples, packed = self.rollout.examples, self.packed
        for what, value in named.items():
            bad = sorted(bad_places(value).items())
            if bad:
                rows = [BadRow(holder[row], examples[row], 0, values) for row, values in bad]
                batches = {row.micro_batch: packed[row.micro_batch] for row in rows}
                detail, weights = (details or {}).get(what, ""), broken_weights(model)
                raise NotFinite(self.update + 1, what, rows, len(examples), batches, detail, weights)


@dataclass(frozen=True)
class PpoBatch:
    """A micro-batch of responses; matrices are (C, R) and stay fixed during the epochs.

    examples, pack: see `ExampleBatch`; each example has one response.
    """

    batch: PackedBatch
    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor | None  # None without a critic
    advantages: Tensor
    returns: Tensor | None  # None without a critic
    first: bool  # whether it is in the first minibatch of the first epoch, where the ratio must be 1
    ref_logprobs: Tensor | None = None  # None unless the KL is in the loss
    weights: Tensor | None = None  # importance weights, if another engine has sampled
    examples: Sequence[Example] = ()
    pack: Pack | None = None
    share: float = 1.0  # share of the micro-batch that it was cut from

    def part(self, rows: slice) -> PpoBatch:
        """Some of its responses as a micro-batch, with their fixed values."""
        assert self.pack is not None
        examples = self.examples[rows]
        names = ("mask", "old_logprobs", "old_values", "advantages", "returns", "ref_logprobs", "weights")
        fixed = {name: value[rows] for name in names if (value := getattr(self, name)) is not None}
        return replace(
            self,
            batch=self.pack(examples),
            examples=examples,
            share=self.share * len(examples) / len(self.examples),
            **fixed,
        )


def cut_rows(groups: list[list[int]], halvings: int) -> list[list[int]]:
    """Groups of row numbers, each halved `halvings` times."""
    return [group[piece] for group in groups for piece in pieces(len(group), halvings)]
