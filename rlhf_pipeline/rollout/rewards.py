"""Reward sources: the world's true reward, a reward model, and several sources as one reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import PackedBatch, pack, reads
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.modules import RewardModel


class BadScores(RunFailed):
    """A reward source has returned scores that are not finite. label: the source; scores: (C,) its scores."""

    def __init__(self, message: str, label: str, scores: Tensor):
        super().__init__(message)
        self.label, self.scores = label, scores


class RewardSource(Protocol):
    """Scores completions. `packed` holds the same examples, for sources that read tensors; it may be None.

    skips: whether the score nan means that the source does not apply to a response.
    """

    skips: ClassVar[bool]

    @property
    def label(self) -> str:
        """The name of the source in logs and manifests."""
        ...

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        """Scores (C,) in fp32, in the order of the examples and their completions."""
        ...


@dataclass(frozen=True)
class WorldReward:
    """The true reward of `world:verdicts`."""

    label: str = "world"
    skips: ClassVar[bool] = False

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        return torch.tensor(world_verdicts(examples).reward, dtype=torch.float32)


def world_verdicts(examples: Sequence[Example]) -> world.Verdicts:
    """Reward and well-formedness of all completions of examples of `world:verdicts`."""
    prompts = [example.prompt_ids for example in examples for _ in example.completions]
    completions = [ids for example in examples for ids in example.completions]
    ended = [flag for example in examples for flag in example.ended]
    return world.verdicts(prompts, completions, ended)


@dataclass(frozen=True)
class ModelReward:
    """The score of a reward model that reads the policy's token ids."""

    label: str
    model: RewardModel
    device: torch.device | str = "cpu"
    skips: ClassVar[bool] = False

    @torch.no_grad()
    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        if packed is None or not reads(self.model.reader.layout, packed):
            packed = pack(examples, layout=self.model.reader.layout).to(self.device)
        return self.model(packed).float()


Combination = Literal["sum", "min", "mean_minus_std"]


@dataclass
class CombinedReward:
    """Several sources as one reward, from the weighted scores s_i = weight_i * score_i of a response:

        sum: sum_i s_i    min: min_i s_i    mean_minus_std: mean_i s_i - sqrt(mean_i (s_i - mean_i s_i)^2)

    A source that does not apply to a response (score nan, `skips`) is left out; a response to which none applies has
    the score 0, which is logged once. Source of min and of mean minus spread: Coste et al. 2024 (reward model
    ensembles), section 3, with the standard deviation in place of the variance.

    Raises:
        BadScores: scores are not finite; the message names their source.
    """

    parts: tuple[tuple[float, RewardSource], ...]
    combination: Combination = "sum"
    say: Callable[[str], None] = lambda text: None
    skips: ClassVar[bool] = False
    _said: bool = False

    @property
    def label(self) -> str:
        terms = [source.label if weight == 1.0 else f"{weight:g} x {source.label}" for weight, source in self.parts]
        return " + ".join(terms) if self.combination == "sum" else f"{self.combination}({', '.join(terms)})"

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        rows = []
        # All sources score before one is refused: with divided weights all processes make the same passes.
        scored = [source.score(examples, packed).cpu() for _, source in self.parts]
        for (weight, source), scores in zip(self.parts, scored, strict=True):
            if not bool((torch.isfinite(scores) | (torch.isnan(scores) & source.skips)).all()):
                message = f"reward {source.label}: found scores that are not finite, expected finite ones"
                raise BadScores(message, source.label, scores)
            rows.append(weight * scores)
        applies = [~torch.isnan(row) for row in rows]
        count = torch.stack(applies).sum(0)
        if not self._said and bool((count == 0).any()):
            self._said = True
            self.say(f"{self.label}: gave a response no score (None); the response gets the score 0")
        return torch.where(count == 0, 0.0, self._combined(rows, applies, count.clamp_min(1)))

    def _combined(self, rows: Sequence[Tensor], applies: Sequence[Tensor], count: Tensor) -> Tensor:
        if self.combination == "min":
            filled = [torch.where(there, row, torch.inf) for row, there in zip(rows, applies, strict=True)]
            return torch.stack(filled).amin(0)
        total = torch.zeros_like(rows[0])
        for row, there in zip(rows, applies, strict=True):
            total = total + torch.where(there, row, 0.0)
        if self.combination == "sum":
            return total
        mean = total / count
        away = [torch.where(there, (row - mean) ** 2, 0.0) for row, there in zip(rows, applies, strict=True)]
        return mean - (torch.stack(away).sum(0) / count).sqrt()
