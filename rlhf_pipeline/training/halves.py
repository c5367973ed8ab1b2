"""Cut micro-batches in halves when memory runs out (models/memory.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def pieces(count: int, halvings: int) -> list[slice]:
    """The slices of `count` items after `halvings` halvings, the larger half first; a single item is not cut."""
    cut = [slice(0, count)]
    for _ in range(halvings):
        cut = [half for whole in cut for half in _halves(whole)]
    return cut


def _halves(whole: slice) -> list[slice]:
    middle = (whole.start + whole.stop + 1) // 2
    return [whole] if middle == whole.stop else [slice(whole.start, middle), slice(middle, whole.stop)]


def cut_micro_batches(micro_batches: Sequence[Any], halvings: int) -> Iterator[Any]:
    """The micro-batches of a window, each halved `halvings` times; trees are not cut."""
    for micro_batch in micro_batches:
        cut = pieces(size_of(micro_batch), halvings)
        yield from [micro_batch] if len(cut) == 1 else (micro_batch.part(piece) for piece in cut)


def size_of(micro_batch: Any) -> int:
    """The number of examples that a micro-batch can be cut into."""
    return len(getattr(micro_batch, "examples", ())) or 1
