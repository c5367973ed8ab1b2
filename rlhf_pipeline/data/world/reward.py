"""The true reward of `world:verdicts`, vectorised over responses.

A well-formed response is `phrase` or `phrase and phrase` with phrase = [modifier] adjective. Its reward is

    R = m_1 v(adj_1) + 0.6 m_2 v(adj_2) - 1.5 [adj_1 = adj_2] - 0.5 [not ended]

with v(adj) = base valence + shift by genre + shift by aspect, m = 2 (very), 0.6 (quite), -0.75 (not), else 1.
Anything else is ill-formed and has R = -2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.data.world.vocabulary import (
    ADJECTIVES,
    ASPECTS,
    CONJUNCTION,
    GENRES,
    MODIFIERS,
    RESPONSE_LENGTH,
    TOKEN_ID,
    VOCABULARY,
    parse_prompt,
)
from rlhf_pipeline.errors import MismatchError

ILL_FORMED = -2.5
SECOND_PHRASE = 0.6
REPETITION = -1.5
NOT_ENDED = -0.5
MULTIPLIER = {"very": 2.0, "quite": 0.6, "not": -0.75}

# Rows: base, then the shift in each genre, in the order of GENRES.
VALENCE = {
    #          base  comedy horror thriller romance drama western
    "great": (+1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "fine": (+0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "dull": (-1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "awful": (-2.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0),
    "funny": (+0.5, 1.5, -2.5, -1.5, 0.5, -1.0, 0.5),
    "scary": (0.0, -2.0, 2.0, 1.0, -2.0, -0.5, -0.5),
    "tender": (+0.5, 0.0, -2.0, -1.5, 1.5, 1.0, -1.0),
    "slow": (-0.5, -1.0, 0.5, -1.5, 0.5, 1.5, 1.0),
    "tense": (0.0, -1.5, 1.0, 2.0, -1.0, 0.5, 1.5),
    "loud": (0.0, 0.5, 0.5, 0.0, -1.5, -1.5, 1.0),
}
ASPECT_SHIFT = {
    ("pacing", "slow"): -0.5,
    ("music", "loud"): 0.5,
    ("dialogue", "funny"): 0.5,
    ("ending", "tense"): 0.5,
}

# Word classes and the automaton of well-formed responses: state x class -> state.
_MODIFIER, _ADJECTIVE, _AND, _OTHER = range(4)
_START, _MODIFIED, _PHRASE, _JOINED, _MODIFIED_2, _PHRASES, _DEAD = range(7)
_NEXT = np.full((7, 4), _DEAD, dtype=np.int8)
_NEXT[_START, [_MODIFIER, _ADJECTIVE]] = _MODIFIED, _PHRASE
_NEXT[_MODIFIED, _ADJECTIVE] = _PHRASE
_NEXT[_PHRASE, _AND] = _JOINED
_NEXT[_JOINED, [_MODIFIER, _ADJECTIVE]] = _MODIFIED_2, _PHRASES
_NEXT[_MODIFIED_2, _ADJECTIVE] = _PHRASES


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = len(VOCABULARY)
    word_class = np.full(size, _OTHER, dtype=np.int8)
    multiplier = np.ones(size)
    value = np.zeros((len(GENRES), len(ASPECTS), size))
    for word in MODIFIERS:
        word_class[TOKEN_ID[word]] = _MODIFIER
        multiplier[TOKEN_ID[word]] = MULTIPLIER[word]
    word_class[TOKEN_ID[CONJUNCTION]] = _AND
    for word in ADJECTIVES:
        word_class[TOKEN_ID[word]] = _ADJECTIVE
        base, *shifts = VALENCE[word]
        for g in range(len(GENRES)):
            for a, aspect in enumerate(ASPECTS):
                value[g, a, TOKEN_ID[word]] = base + shifts[g] + ASPECT_SHIFT.get((aspect, word), 0.0)
    return word_class, multiplier, value


_CLASS, _MULTIPLIER, VALUE = _tables()


@dataclass(frozen=True)
class Verdicts:
    """reward: (N,) float64; well_formed: (N,) bool."""

    reward: np.ndarray
    well_formed: np.ndarray


def true_reward(
    genres: np.ndarray, aspects: np.ndarray, responses: np.ndarray, word_counts: np.ndarray, ended: np.ndarray
) -> Verdicts:
    """Reward of N responses at once.

    Args:
        genres, aspects: (N,) indices. responses: (N, R) token ids, R <= RESPONSE_LENGTH; what stands behind the
            words does not matter. word_counts: (N,) tokens before the end token. ended: (N,) bool.
    """
    count, width = responses.shape
    if width > RESPONSE_LENGTH:
        raise ValueError(f"responses of {width} tokens; world:verdicts has at most {RESPONSE_LENGTH}")
    state = np.full(count, _START, dtype=np.int8)
    factor = np.ones(count)
    parts = np.zeros((2, count))
    adjective = np.full((2, count), -1, dtype=np.int64)
    for t in range(width):
        token = responses[:, t]
        active = t < word_counts
        kind = _CLASS[token]
        second = (state >= _JOINED).astype(np.int64)
        is_adjective = active & (kind == _ADJECTIVE)
        factor = np.where(active & (kind == _MODIFIER), _MULTIPLIER[token], factor)
        rows = np.nonzero(is_adjective)[0]
        parts[second[rows], rows] = factor[rows] * VALUE[genres[rows], aspects[rows], token[rows]]
        adjective[second[rows], rows] = token[rows]
        factor = np.where(active & (kind != _MODIFIER), 1.0, factor)
        state = np.where(active, _NEXT[state, kind], state)
    well_formed = (state == _PHRASE) | (state == _PHRASES)
    repeated = (state == _PHRASES) & (adjective[0] == adjective[1])
    # Only two phrases have a second part; a dead string's parts are never read.
    reward = parts[0] + SECOND_PHRASE * parts[1] + REPETITION * repeated + np.where(ended, 0.0, NOT_ENDED)
    return Verdicts(np.where(well_formed, reward, ILL_FORMED), well_formed)


def verdicts(prompts: Sequence[list[int]], completions: Sequence[list[int]], ended: Sequence[bool]) -> Verdicts:
    """Reward of completions (token ids, with their end token where `ended`) of prompts of this world."""
    count = len(prompts)
    pairs = np.array([parse_prompt(ids) for ids in prompts], dtype=np.int64).reshape(count, 2)
    words = np.array([len(ids) - bool(end) for ids, end in zip(completions, ended, strict=True)], dtype=np.int64)
    responses = np.zeros((count, RESPONSE_LENGTH), dtype=np.int64)
    for row, ids in enumerate(completions):
        if len(ids) > RESPONSE_LENGTH:
            raise MismatchError(
                f"a response of {len(ids)} tokens; responses of world:verdicts have at most {RESPONSE_LENGTH}; "
                f"set response_length: {RESPONSE_LENGTH} (--max-new-tokens {RESPONSE_LENGTH})"
            )
        responses[row, : len(ids)] = ids
    return true_reward(pairs[:, 0], pairs[:, 1], responses, words, np.asarray(ended, dtype=bool))
