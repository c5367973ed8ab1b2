"""Where the responses of a labelling project come from, and how sure a reward model is of the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from pydantic import Field

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Item, Part


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
