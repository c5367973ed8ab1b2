"""Demonstrations of `world:verdicts`: a small probabilistic grammar, a critic of mixed taste."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from rlhf_pipeline.data.world.reward import VALUE
from rlhf_pipeline.data.world.vocabulary import (
    ADJECTIVES,
    ASPECTS,
    CONJUNCTION,
    EOS_ID,
    GENRES,
    MODIFIERS,
    RESPONSE_LENGTH,
    TOKEN_ID,
)

PER_PROMPT = 1000
TASTE = 0.1
"""Demonstrators choose adjectives with probability ~ exp(TASTE x value): little better than chance."""

SHAPES = {"A": 0.32, "MA": 0.32, "A&A": 0.16, "MA&A": 0.07, "A&MA": 0.07, "noise": 0.06}
"""Probability of each form (A adjective, M modifier, & conjunction); noise is a string of response words."""

_RESPONSE_WORDS = [TOKEN_ID[word] for word in (*MODIFIERS, CONJUNCTION, *ADJECTIVES)]
_MODIFIER_IDS = [TOKEN_ID[word] for word in MODIFIERS]
_ADJECTIVE_IDS = [TOKEN_ID[word] for word in ADJECTIVES]


def _completion(rng: np.random.Generator, shape: str, cumulative: list[float]) -> tuple[list[int], bool]:
    """Sample one completion of a shape.

    cumulative: cumulative probabilities of the adjectives, inverted at a uniform number. This draws the same words as
        `rng.choice` in a fifth of the time.
    """
    if shape == "noise":
        words = [int(word) for word in rng.choice(_RESPONSE_WORDS, size=rng.integers(0, RESPONSE_LENGTH + 1))]
    else:
        words = []
        for symbol in shape:
            if symbol == "A":
                words.append(_ADJECTIVE_IDS[bisect_right(cumulative, rng.random())])
            elif symbol == "M":
                words.append(_MODIFIER_IDS[rng.integers(len(MODIFIERS))])
            else:
                words.append(TOKEN_ID[CONJUNCTION])
    # Four words fill the length limit: such a response is cut, it has no end token.
    ended = len(words) < RESPONSE_LENGTH
    return words + [EOS_ID] * ended, ended


def demonstrations(genre: str, aspect: str, count: int = PER_PROMPT, seed: int = 0) -> list[tuple[list[int], bool]]:
    """Sample `count` completions (token ids, ended) for one prompt; deterministic for a given seed."""
    g, a = GENRES.index(genre), ASPECTS.index(aspect)
    rng = np.random.default_rng([seed, g, a])
    weights = np.exp(TASTE * VALUE[g, a, [TOKEN_ID[word] for word in ADJECTIVES]])
    shapes = rng.choice(list(SHAPES), size=count, p=list(SHAPES.values()))
    cumulative = (weights / weights.sum()).cumsum()
    cumulative = (cumulative / cumulative[-1]).tolist()
    return [_completion(rng, shape, cumulative) for shape in shapes.tolist()]
