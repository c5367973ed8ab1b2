"""The responses of a labelling project: whose turn it is, what is drawn again, where a reward model is in doubt."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pydantic import Field

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Item, Part, Response

REDRAWS = 3
"""How often a response is drawn again that is like another response of its item."""
Draw = Callable[[Mapping[int, Sequence[int]]], Iterator[tuple[int, int, Response]]]


class Origin(Part):
    """Where the responses of a project come from.

    parents: digest of each model, by its reference. tokenizer_digest: of the tokenizer that the token ids of all items
    are of; None: the items have no token ids, because the models have different ones or because a file gave the texts.
    """

    parents: dict[str, str | None] = Field(default_factory=dict)
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None


@dataclass(frozen=True)
class Made:
    """Items with what is known of them. uncertainty: of each item; None where the order is by hash."""

    items: list[Item]
    origin: Origin
    uncertainty: list[float] | None = None


def turns(config: LabelConfig, item: int) -> list[int]:
    """Return the numbers of the models that respond to an item's prompt, in the order of its responses.

    Models take turns, and a later item begins with a later one. In an arena, every pair of models takes its turn.
    """
    models = len(config.models)
    if config.arena:
        pairs = list(combinations(range(models), 2))
        return list(pairs[item % len(pairs)])
    return [(item + k) % models for k in range(config.k)]


def winner_entropy(scores: Sequence[float]) -> float:
    """Return the entropy, in nats, of which response is the best one by the Plackett-Luce model at unit scale.

    P(k is the best) = exp(s_k) / sum_j exp(s_j), and H = -sum_k P(k) log P(k) (Plackett 1975; Luce 1959).
    """
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    # -log P(k) = log(total) - (s_k - top)
    return math.fsum(w / total * (math.log(total) - (s - top)) for w, s in zip(weights, scores, strict=True))


def give(
    draw: Draw, todo: Mapping[int, Sequence[int]], drawn: Sequence[dict[int, Response]], redraws: int
) -> Counter[str]:
    """Give items their responses; one that is like another of its item is drawn again up to `redraws` times.

    Args:
        draw: yields (item, k, response) for the wanted k of each item. todo: the wanted k of each item. drawn: the
            responses of each item by k, to which those that are different are added. redraws: 0 keeps all as they are.

    Returns:
        How many responses were drawn `again`, and how many were left out as still alike (`merged`).
    """
    counts = Counter[str]()
    for attempt in range(1 + redraws):
        alike: defaultdict[int, list[int]] = defaultdict(list)
        for number, k, response in draw(todo):
            if redraws and response.text in {one.text for one in drawn[number].values()}:
                alike[number].append(k)
            else:
                drawn[number][k] = response
        counts["again" if attempt < redraws else "merged"] += sum(map(len, alike.values()))
        todo = alike
        if not todo:
            break
    return counts
