"""The points of growth.py: what grows, how far, and the work at each point. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SERIES = {
    "length": "tokens of a pair",
    "data": "examples",
    "vocabulary": "vocabulary",
    "completions": "completions of a prompt",
    "batch": "pairs of a micro-batch",
}
THREADS = 2


@dataclass(frozen=True)
class Sizes:
    """How far each series goes, and how much work a point is.

    model, small: keys over those of bench_work.LLAMA; small: of the vocabulary, whose weights it keeps small.
    A point ends after `most` timed steps, or after `least` once they have taken `seconds`.
    """

    length: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    data: tuple[int, ...] = (1_000, 10_000, 100_000)
    vocabulary: tuple[int, ...] = (2**10, 2**12, 2**15, 2**17)
    completions: tuple[int, ...] = (2, 4, 8, 16)
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    model: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 64, "intermediate_size": 172})
    vocab_size: int = 4096
    pairs: int = 8  # of a step, where nothing else is said
    longest_full: int = 1024  # pairs that are longer come half as many to a step
    vocabulary_length: int = 512
    batch_length: int = 64
    step_pairs: int = 64  # of a step, however many of them are a micro-batch
    data_pairs: int = 32
    prompt: int = 64  # of a ranking
    completion: int = 32
    step_completions: int = 16
    warmup: int = 1  # steps after the first one, which makes gradients and optimizer state
    least: int = 5
    most: int = 30
    seconds: float = 2.0

    def points(self, series: str) -> tuple[int, ...]:
        """The values of a series, growing."""
        return getattr(self, series)

    def pairs_of(self, length: int) -> int:
        """Pairs of a step at a length."""
        return self.pairs if length <= self.longest_full else self.pairs // 2


QUICK = Sizes(
    length=(16, 128),
    data=(40, 80),
    vocabulary=(64, 128),
    completions=(2, 3),
    batch=(2, 4),
    model={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    small={"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1},
    vocab_size=300,
    pairs=4,
    longest_full=64,
    vocabulary_length=16,
    batch_length=16,
    step_pairs=4,
    data_pairs=8,
    prompt=8,
    completion=4,
    step_completions=6,
    warmup=1,
    least=2,
    most=2,
    seconds=0.0,
)
