"""Items, judgements, and labelers that are drawn from a known law."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_pipeline.labelling.kinds import Item, Judgement, Response, Text


def item(number: int, *texts: Text, prompt: str = "Say something.") -> Item:
    """An item with these responses."""
    return Item(number=number, prompt=prompt, responses=[Response(text=text) for text in texts or ("a", "b")])


def judgement(labeler: int, number: int, ranks: Sequence[int], **given: object) -> Judgement:
    """A judgement with these ranks; no ratings, no flags, shown in the order of numbers, 30 seconds."""
    size = len(ranks)
    values: dict[str, object] = {
        "repeat": 0,
        "shown": list(range(size)),
        "ratings": [None] * size,
        "flags": [{} for _ in range(size)],
        "seconds": 30.0,
        "at": 0.0,
    }
    return Judgement.model_validate({"labeler": labeler, "item": number, "ranks": list(ranks), **values, **given})


def skipped(labeler: int, number: int, **given: object) -> Judgement:
    """A skipped item."""
    given = {"shown": [0, 1], "skipped": True, "reason": "unclear", **given}
    return judgement(labeler, number, [], ratings=[], flags=[], **given)


def dense(values: Sequence[float]) -> list[int]:
    """Dense ranks, the largest value first."""
    order = sorted(set(values), reverse=True)
    return [order.index(value) + 1 for value in values]


def crowd(
    draw: np.random.Generator, reliabilities: Sequence[float], *, items: int, size: int = 4
) -> tuple[list[Item], list[Judgement]]:
    """Rankings of every item by every labeler by Plackett-Luce with utilities a_j s: pairs obey sigma(a_j (s_i - s_k)).

    s is normal with variance 1/2, so that s_i - s_k has variance 1 (a ranking by a_j s plus Gumbel noise is a sample
    of Plackett-Luce).
    """
    found = []
    for number in range(items):
        s = draw.normal(scale=0.5**0.5, size=size)
        for labeler, a in enumerate(reliabilities):
            found.append(judgement(labeler, number, dense((a * s + draw.gumbel(size=size)).tolist())))
    return [item(number, *("abcdefghi"[:size])) for number in range(items)], found
