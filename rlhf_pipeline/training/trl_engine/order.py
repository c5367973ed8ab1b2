"""The examples for TRL's trainer, their columns and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_pipeline.data.batch import micro_batches
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.training.pairs import recorded_margins
from rlhf_pipeline.training.windows import epoch_order

IGNORED = -100
"""The label that TRL's losses ignore."""


def columns(stage: str, examples: Sequence[Example], margins: bool = False) -> dict[str, list[Any]]:
    """The columns that TRL's trainer of a stage reads.

    sft: prompt and completion as input_ids, with labels only for its trained tokens. reward: the prompt with each
    response, as chosen_ids and rejected_ids, with `margins` also their margin. dpo: prompt_ids, and each response
    without the prompt.
    """
    if stage == "sft":
        labels = [[IGNORED] * len(e.prompt_ids) + _targets(e) for e in examples]
        return {"input_ids": [e.prompt_ids + e.completions[0] for e in examples], "labels": labels}
    pair = (("chosen_ids", 0), ("rejected_ids", 1))
    if stage == "reward":
        sides: dict[str, list[Any]] = {n: [e.prompt_ids + e.completions[k] for e in examples] for n, k in pair}
        return sides | ({"margin": recorded_margins(examples).tolist()} if margins else {})
    prompts = [e.prompt_ids for e in examples]
    return {"prompt_ids": prompts} | {name: [e.completions[k] for e in examples] for name, k in pair}


def _targets(example: Example) -> list[int]:
    ids, trained = example.completions[0], example.trained
    return ids if trained is None else [token if flag else IGNORED for token, flag in zip(ids, trained)]


class WindowSampler:
    """Indices in the order of `example_windows`, for a data loader that cuts them into micro-batches.

    Every window except the last of an epoch has whole micro-batches, and an epoch starts with a new window. So a loader
    that takes `micro_batch_size` indices at a time, with a trainer that steps after `accumulation` batches and at the
    end of the epoch, makes the same windows of the same micro-batches as the native loop.
    """

    def __init__(self, examples: Sequence[Example], *, micro_batch_size: int, accumulation: int, seed: int):
        self.examples, self.micro_batch_size, self.seed = examples, micro_batch_size, seed
        self.size = micro_batch_size * accumulation
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        for window in self.windows(self.epoch):
            yield from window

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each pass."""
        self.epoch = epoch

    def windows(self, epoch: int) -> Iterator[list[int]]:
        """The windows of one epoch, each with its members in the order of its micro-batches."""
        order = epoch_order(len(self.examples), self.seed, epoch)
        for start in range(0, len(order), self.size):
            members = order[start : start + self.size]
            groups = micro_batches([self.examples[index] for index in members], self.micro_batch_size)
            yield [members[place] for group in groups for place in group]

    def all_windows(self) -> Iterator[list[int]]:
        """The windows of all epochs in sequence, without end."""
        epoch = 0
        while True:
            yield from self.windows(epoch)
            epoch += 1
