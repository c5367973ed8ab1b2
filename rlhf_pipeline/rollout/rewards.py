"""Reward sources: the world's true reward, a reward model, a Python function, and weighted sums of these."""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import PackedBatch, pack, reads
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.modules import RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BadScores(RunFailed):
    """A reward source has returned scores that are not finite. label: the source; scores: (C,) its scores."""

    def __init__(self, message: str, label: str, scores: Tensor):
        super().__init__(message)
        self.label, self.scores = label, scores


class RewardSource(Protocol):
    """Scores completions. `packed` holds the same examples, for sources that read tensors; it may be None."""

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
    pad_id: int
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        if packed is None or not reads(self.model.reader.layout, packed):
            packed = pack(examples, self.pad_id, layout=self.model.reader.layout).to(self.device)
        return self.model(packed).float()


@dataclass(frozen=True)
class FunctionReward:
    """A Python function f(prompts, completions, **columns) -> list of floats, with TRL's signature.

    The columns are completion_ids and ended. Texts are decoded without the stop token.
    """

    label: str
    function: Callable[..., Sequence[float]]
    tokenizer: PreTrainedTokenizerBase

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        prompts, completions, ids, ended = [], [], [], []
        for example in examples:
            prompt = example.prompt_text or self.tokenizer.decode(example.prompt_ids)
            for completion, end in zip(example.completions, example.ended, strict=True):
                prompts.append(prompt)
                completions.append(self.tokenizer.decode(completion[:-1] if end else completion))
                ids.append(list(completion))
                ended.append(bool(end))
        try:
            # stdout is for the result of the command, so the function's output goes to stderr.
            with contextlib.redirect_stdout(sys.stderr):
                values = self.function(prompts, completions, completion_ids=ids, ended=ended)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RunFailed(
                f"reward function {self.label}: {type(error).__name__}: {error} ({place.filename}:{place.lineno}); "
                "the call was f(prompts, completions, completion_ids=..., ended=...)"
            ) from error
        try:
            numbers = [] if any(isinstance(value, str) for value in values) else [_float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(prompts):
            kinds = sorted({type(value).__name__ for value in values}) if isinstance(values, list | tuple) else ""
            raise RunFailed(
                f"reward function {self.label}: expected {len(prompts)} numbers, one per completion, found "
                f"{len(values) if hasattr(values, '__len__') else type(values).__name__} values {kinds}"
            )
        scores = torch.tensor(numbers, dtype=torch.float32)
        for index in (~torch.isfinite(scores)).nonzero().flatten().tolist()[:1]:
            message = (
                f"reward function {self.label}: found {numbers[index]} for the completion {completions[index]!r} of "
                f"the prompt {prompts[index]!r}, expected a finite number in the range of fp32"
            )
            raise BadScores(message, self.label, scores)
        return scores


def _float(value: Any) -> float:
    """A number as a float; a number that is too large becomes infinite and is refused later."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass(frozen=True)
class WeightedReward:
    """The weighted sum sum_i weight_i * score_i.

    Raises:
        BadScores: scores are not finite; the message names their source.
    """

    parts: tuple[tuple[float, RewardSource], ...]

    @property
    def label(self) -> str:
        if len(self.parts) == 1 and self.parts[0][0] == 1.0:
            return self.parts[0][1].label
        return " + ".join(f"{weight:g} x {source.label}" for weight, source in self.parts)

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        total = torch.zeros(sum(len(example.completions) for example in examples))
        for weight, source in self.parts:
            scores = source.score(examples, packed).cpu()
            if not bool(torch.isfinite(scores).all()):
                message = f"reward {source.label}: found scores that are not finite, expected finite ones"
                raise BadScores(message, source.label, scores)
            total = total + weight * scores
        return total
