"""Halve the work and repeat it when memory runs out.

An optimizer step keeps its examples: it has twice as many micro-batches of half the size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from rlhf_pipeline.errors import RunFailed, first_line
from rlhf_pipeline.models.refusals import ran_out

T = TypeVar("T")
MOST_HALVINGS = 3
ADVICE = (
    "try a smaller max_length (or max_prompt_length and response_length), gradient_checkpointing: true, bf16: auto, "
    "a smaller model, or value_init: shared in ppo"
)
PLURALS = {"example": "examples", "response": "responses", "prefix": "prefixes"}
MEASURING_ADVICE = "try a smaller per_device_eval_batch_size, shorter responses or a smaller model"


class Bill(Protocol):
    """The counters of a cost meter."""

    flops: float
    tokens_trained: int
    tokens_generated: int


def release() -> None:
    """Free memory that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Memory:
    """Repeats work with smaller batches when memory runs out, and counts the halvings of each kind of work in a run.

    say: logs every halving. meter: the cost meter, from which the cost of a failed attempt is subtracted. advice: what
    to do if the work does not fit after all halvings.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda text: None, meter: Bill | None = None, *, advice: str = ADVICE
    ):
        self.say, self.meter, self.advice = say, meter, advice
        self.halvings: dict[str, int] = {}
        self.repeats = True  # false if a single process cannot repeat its work alone
        self._holding, self._unit = 1, "example"

    def holds(self, size: int, unit: str = "example") -> None:
        """Record how many examples (or other units) are computed at a time from now on."""
        self._holding, self._unit = size, unit

    def fitting(self, doing: str, size: int) -> int:
        """The size of a batch of `size` after the halvings so far: ceil(size / 2^halvings)."""
        return -(-size // 2 ** self.halvings.get(doing, 0))

    def repeat(self, doing: str, work: Callable[[int], T], discard: Callable[[], None] = lambda: None) -> T:
        """Run work(halvings so far), and repeat it with one more halving each time memory runs out.

        Args:
            doing: the name of the kind of work. discard: removes the results of a failed attempt.

        Raises:
            RunFailed: three halvings were not enough, or a single example does not fit.
        """
        while True:
            times, bill = self.halvings.get(doing, 0), self._bill()
            try:
                return work(times)
            except Exception as error:
                if not ran_out(error):
                    raise
                found = first_line(error)
            # The error is gone only here, and with it the last references to the tensors of its frames.
            for name, value in bill.items():
                setattr(self.meter, name, value)
            discard()
            release()
            self._halve(doing, times, found)

    def shrink(self, doing: str, size: int, work: Callable[[int], T], unit: str = "response") -> T:
        """Run work(responses at a time), and halve their number each time memory runs out; see `repeat`."""

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
            f"out of memory in {doing}: {size} not fit ({found}); halved from now on (halving {times + 1} of "
            f"{MOST_HALVINGS}){kept}"
        )

    def _bill(self) -> dict[str, Any]:
        names = ("flops", "tokens_trained", "tokens_generated")
        return {} if self.meter is None else {name: getattr(self.meter, name) for name in names}
