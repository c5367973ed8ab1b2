"""Memory that runs out: what is computed at a time is halved, and computed again.

An optimizer step keeps its examples: its micro-batches hold half as many, and there are twice as many of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.refusals import first_line, ran_out
from rlhf_pipeline.training.cost import CostMeter

T = TypeVar("T")
MOST_HALVINGS = 3
ADVICE = (
    "try a smaller max_length (or max_prompt_length and response_length), gradient_checkpointing: true, bf16: auto, "
    "a smaller model, or in ppo value_init: shared"
)


def pieces(count: int, halvings: int) -> list[slice]:
    """Where `count` things are cut that are halved so many times, the larger half first; one thing stays whole."""
    cut = [slice(0, count)]
    for _ in range(halvings):
        cut = [half for whole in cut for half in _halves(whole)]
    return cut


def _halves(whole: slice) -> list[slice]:
    middle = (whole.start + whole.stop + 1) // 2
    return [whole] if middle == whole.stop else [slice(whole.start, middle), slice(middle, whole.stop)]


def cut_micro_batches(micro_batches: Sequence[Any], halvings: int) -> Iterator[Any]:
    """The micro-batches of a window, each halved so many times; trees stay whole."""
    for micro_batch in micro_batches:
        cut = pieces(size_of(micro_batch), halvings)
        yield from [micro_batch] if len(cut) == 1 else (micro_batch.part(piece) for piece in cut)


def size_of(micro_batch: Any) -> int:
    """The number of examples that a micro-batch can be cut into."""
    return len(getattr(micro_batch, "examples", ())) or 1


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Memory:
    """How often each kind of work has been halved in a run, and who repeats it.

    say: told of every halving. meter: what a failed attempt has put on the bill is taken off again.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None, meter: CostMeter | None = None):
        self.say, self.meter = say, meter
        self.halvings: dict[str, int] = {}
        self.repeats = True  # false where one process alone cannot repeat its work
        self._holding = 1

    def holds(self, size: int) -> None:
        """Note how many examples are computed at a time from here on."""
        self._holding = size

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

    def shrink(self, doing: str, size: int, work: Callable[[int], T]) -> T:
        """work(batch size), with the size halved each time that memory runs out; see `repeat`."""

        def sized(times: int) -> T:
            self.holds(-(-size // 2**times))
            return work(self._holding)

        return self.repeat(doing, sized)

    def _halve(self, doing: str, times: int, found: str) -> None:
        size = "a single example does" if self._holding <= 1 else f"{self._holding} examples at a time do"
        if self._holding <= 1 or times == MOST_HALVINGS or not self.repeats:
            halved = f" after {times} of {MOST_HALVINGS} halvings" if times else ""
            alone = "" if self.repeats else " (several processes that share one model cannot repeat a step)"
            raise RunFailed(f"out of memory in {doing}: {size} not fit{halved}{alone} ({found}); {ADVICE}")
        self.halvings[doing] = times + 1
        self.say(
            f"out of memory in {doing}: {size} not fit ({found}); halved from here on (halving {times + 1} of "
            f"{MOST_HALVINGS}), an optimizer step keeps its examples"
        )

    def _bill(self) -> dict[str, Any]:
        names = ("flops", "tokens_trained", "tokens_generated")
        return {} if self.meter is None else {name: getattr(self.meter, name) for name in names}

    def _put_back(self, bill: Mapping[str, Any]) -> None:
        for name, value in bill.items():
            setattr(self.meter, name, value)
