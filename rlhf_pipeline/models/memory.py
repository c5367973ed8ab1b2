"""Memory that runs out: what is computed at a time is halved, and computed again.

An optimizer step keeps its examples: its micro-batches hold half as many, and there are twice as many of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.refusals import first_line, ran_out

T = TypeVar("T")
MOST_HALVINGS = 3
ADVICE = (
    "try a smaller max_length (or max_prompt_length and response_length), gradient_checkpointing: true, bf16: auto, "
    "a smaller model, or in ppo value_init: shared"
)
PLURALS = {"example": "examples", "response": "responses", "prefix": "prefixes"}
MEASURING_ADVICE = "try a smaller per_device_eval_batch_size, shorter responses or a smaller model"


class Bill(Protocol):
    """The counts of a cost meter."""

    flops: float
    tokens_trained: int
    tokens_generated: int


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Memory:
    """How often each kind of work has been halved in a run, and who repeats it.

    say: logs every halving. meter: what a failed attempt has put on the bill is taken off again. advice: what to do
    when nothing helps.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda text: None, meter: Bill | None = None, *, advice: str = ADVICE
    ):
        self.say, self.meter, self.advice = say, meter, advice
        self.halvings: dict[str, int] = {}
        self.repeats = True  # false where one process alone cannot repeat its work
        self._holding, self._unit = 1, "example"

    def holds(self, size: int, unit: str = "example") -> None:
        """Note how many examples (or other units) are computed at a time from here on."""
        self._holding, self._unit = size, unit

    def fitting(self, doing: str, size: int) -> int:
        """What is left of a batch of `size` after the halvings so far: ceil(size / 2^halvings)."""
        return -(-size // 2 ** self.halvings.get(doing, 0))

    def repeat(self, doing: str, work: Callable[[int], T], discard: Callable[[], None] = lambda: None) -> T:
        """work(halvings so far), again with one halving more each time that memory runs out.

        Args:
            doing: names the kind of work. discard: throws away what a failed attempt has left.

        Raises:
            RunFailed: after three halvings, or where a single example does not fit.
        """
        while True:
            times, bill = self.halvings.get(doing, 0), self._bill()
            try:
                return work(times)
            except Exception as error:
                if not ran_out(error):
                    raise
                found = first_line(error)
            # Only here, where the error is gone, does nothing refer to the tensors of its frames any more.
            self._put_back(bill)
            discard()
            release()
            self._halve(doing, times, found)

    def shrink(self, doing: str, size: int, work: Callable[[int], T], unit: str = "response") -> T:
        """work(responses at a time), with their number halved each time that memory runs out; see `repeat`."""

        def sized(_times: int) -> T:
            self.holds(self.fitting(doing, size), unit)
            return work(self._holding)

        return self.repeat(doing, sized)

    def _halve(self, doing: str, times: int, found: str) -> None:
        one, unit = self._holding <= 1, self._unit
        size = f"a single {unit} does" if one else f"{self._holding} {PLURALS[unit]} at a time do"
        if one or times == MOST_HALVINGS or not self.repeats:
            halved = f" after {times} of {MOST_HALVINGS} halvings" if times else ""
            alone = "" if self.repeats else " (several processes that share one model cannot repeat a step)"
            raise RunFailed(f"out of memory in {doing}: {size} not fit{halved}{alone} ({found}); {self.advice}")
        self.halvings[doing] = times + 1
        kept = ", an optimizer step keeps its examples" if unit == "example" else ""
        self.say(
            f"out of memory in {doing}: {size} not fit ({found}); halved from here on (halving {times + 1} of "
            f"{MOST_HALVINGS}){kept}"
        )

    def _bill(self) -> dict[str, Any]:
        names = ("flops", "tokens_trained", "tokens_generated")
        return {} if self.meter is None else {name: getattr(self.meter, name) for name in names}

    def _put_back(self, bill: Mapping[str, Any]) -> None:
        for name, value in bill.items():
            setattr(self.meter, name, value)
