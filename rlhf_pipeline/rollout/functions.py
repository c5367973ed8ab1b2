"""Python reward functions with the signature of TRL's GRPO trainer."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.records import Messages
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.rollout.rewards import BadScores, CombinedReward, RewardSource
from rlhf_pipeline.rollout.texts import Answer, answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerState

CALL = "f(prompts=..., completions=..., completion_ids=..., ended=..., trainer_state, log_extra, log_metric"


def _trainer_state() -> TrainerState:
    from transformers import TrainerState

    return TrainerState()


@dataclass
class FunctionReward:
    """A function f(prompts=, completions=, completion_ids=, ended=, COLUMN=, ...) -> one number per completion.

    This is the call of TRL's GRPO trainer, with `ended` (whether the response ended) added. Prompts and completions are
    texts without the stop token or, for chat data, lists of messages. A column of the prompt's row that the data format
    does not read is passed under its name, one value per completion. `trainer_state` holds `global_step` and
    `max_steps` (PPO: updates). The function may be `async`. None means that it does not apply: the score is nan.

    logged: the values that the function gave to `log_metric`, by name.
    """

    label: str
    function: Callable[..., Any]
    tokenizer: PreTrainedTokenizerBase
    state: TrainerState = field(default_factory=_trainer_state)
    logged: dict[str, list[float]] = field(default_factory=dict)
    skips: ClassVar[bool] = True

    def at(self, update: int, updates: int) -> None:
        """Begin an update: `trainer_state` counts from 0, and what earlier ones gave to `log_metric` is forgotten."""
        self.state.global_step, self.state.max_steps = update, updates
        self.logged.clear()

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        found = list(answers(examples, self.tokenizer))
        values = self._call(found)
        try:
            listed = [] if isinstance(values, str) or any(isinstance(value, str) for value in values) else list(values)
            numbers = [math.nan if value is None else _float(value) for value in listed]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(found):
            kinds = sorted({type(value).__name__ for value in values}) if isinstance(values, list | tuple) else ""
            raise RunFailed(
                f"reward function {self.label}: expected {len(found)} numbers (or None), one per completion, found "
                f"{len(values) if hasattr(values, '__len__') else type(values).__name__} values {kinds}"
            )
        scores = torch.tensor(numbers, dtype=torch.float32)
        missing = torch.tensor([value is None for value in listed])
        for index in (~torch.isfinite(scores) & ~missing).nonzero().flatten().tolist()[:1]:
            one = found[index]
            message = (
                f"reward function {self.label}: found {numbers[index]} for the completion {one.response!r} of "
                f"the prompt {one.prompt!r}, expected a finite number in the range of fp32, or None"
            )
            raise BadScores(message, self.label, torch.where(missing, 0.0, scores))
        return scores

    def _call(self, found: Sequence[Answer]) -> Any:
        names = dict.fromkeys(name for one in found for name in one.columns)
        columns = {name: [one.columns.get(name) for one in found] for name in names}
        given = {
            "prompts": [one.prompt if isinstance(one.prompt, str) else _turns(one.prompt) for one in found],
            "completions": [one.response if isinstance(one.prompt, str) else _turns(one.reply) for one in found],
            "completion_ids": [one.ids for one in found],
            "ended": [one.ended for one in found],
            "trainer_state": self.state,
            "log_extra": lambda column, values: None,  # PPO has no table of completions
            "log_metric": lambda name, value: self.logged.setdefault(name, []).append(float(value)),
        }
        try:
            # stdout is for the result of the command, so the function's output goes to stderr.
            with contextlib.redirect_stdout(sys.stderr):
                values = self.function(**{**columns, **given})
                return _finished(values) if inspect.isawaitable(values) else values
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            further = "".join(f", {name}=..." for name in columns)
            raise RunFailed(
                f"reward function {self.label}: {type(error).__name__}: {error} ({place.filename}:{place.lineno}); "
                f"the call was {CALL}{further})"
            ) from error


def functions_of(reward: RewardSource) -> list[FunctionReward]:
    """The functions among the parts of a reward."""
    parts = reward.parts if isinstance(reward, CombinedReward) else ()
    return [source for _, source in parts if isinstance(source, FunctionReward)]


def _turns(messages: Messages) -> list[dict[str, str]]:
    """Messages as a list of dicts, which the function may change."""
    return [dict(message) for message in messages]


def _finished(waiting: Any) -> Any:
    """The result of an `async` function. A thread of its own runs it, since a notebook has a running event loop."""

    async def result() -> Any:
        return await waiting

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, result()).result()


def _float(value: Any) -> float:
    """A number as a float; a number that is too large becomes infinite and is refused later."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
