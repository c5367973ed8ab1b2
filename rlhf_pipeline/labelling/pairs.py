"""Comparisons of two responses that judgements contain, and shares of them with intervals over items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from rlhf_pipeline.data.records import plain
from rlhf_pipeline.evaluation.statistics import Estimate, cluster_mean
from rlhf_pipeline.labelling.kinds import Item, Judgement, Text


class Pair(NamedTuple):
    """Two responses of one judgement: `better` has the better rank than `worse` (numbers k), or both are tied."""

    judgement: Judgement
    better: int
    worse: int
    tied: bool = False

    @property
    def item(self) -> int:
        """The number of the item."""
        return self.judgement.item

    @property
    def key(self) -> tuple[int, int, int]:
        """What is compared: the item, and both responses in the order of their numbers."""
        return self.item, *sorted((self.better, self.worse))  # type: ignore[return-value]

    @property
    def won(self) -> float:
        """1 if the response with the lower number is better, 0 if it is worse, 1/2 for a tie."""
        return 0.5 if self.tied else float(self.better < self.worse)


def pairs_of(items: Sequence[Item], judgements: Iterable[Judgement], *, ties: bool = False) -> list[Pair]:
    """The untied comparisons of all judgements that were not skipped, K (K - 1) / 2 at most for K responses.

    Args:
        ties: whether tied pairs are there too, as `tied`, with better < worse.

    Raises:
        ValueError: a judgement of an item that is not there, or with another number of ranks than responses.
    """
    sizes = {item.number: len(item.responses) for item in items}
    found = []
    for judgement in judgements:
        if judgement.skipped:
            continue
        ranks, size = judgement.ranks, sizes.get(judgement.item)
        if size != len(ranks):
            raise ValueError(
                f"item {judgement.item}: found a judgement of {len(ranks)} responses, expected "
                + ("an item of the project" if size is None else f"its {size} responses")
            )
        for i, k in combinations(range(size), 2):
            if ranks[i] != ranks[k]:
                found.append(Pair(judgement, *((i, k) if ranks[i] < ranks[k] else (k, i))))
            elif ties:
                found.append(Pair(judgement, i, k, tied=True))
    return found


def length(text: Text) -> int:
    """The characters of a text, or of messages with their roles."""
    return len(plain(text if isinstance(text, str) else tuple(text)))


def lengths_of(items: Sequence[Item]) -> dict[int, list[int]]:
    """The characters of each response of each item, by the item's number."""
    return {item.number: [length(response.text) for response in item.responses] for item in items}


def share(values: Sequence[float], items: Sequence[int]) -> Estimate | None:
    """The mean over items of a share, with Wilson's interval over items; None without values.

    Comparisons of one item depend on each other, so that the item is the unit (`statistics.cluster_mean`).
    """
    return cluster_mean(values, items, share=True) if values else None
