"""How different a policy's responses are: distinct n-grams and self-BLEU."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

ORDERS = (1, 2, 4)

SELF_BLEU: dict[str, Any] = {"tokenize": "13a", "smooth_method": "exp", "effective_order": True, "max_ngram_order": 4}
"""Settings of sacrebleu: mteval's tokenisation, exponential smoothing, and shorter n-grams only where a response has
fewer than four words."""


def token_budget(arms: Iterable[Sequence[Sequence[Hashable]]]) -> int:
    """The number of tokens that every arm has: the smallest total over arms, each a list of responses."""
    return min(sum(len(response) for response in responses) for responses in arms)


def distinct(
    responses: Sequence[Sequence[Hashable]], budget: int, *, orders: Sequence[int] = ORDERS, seed: int = 0
) -> dict[str, float]:
    """Distinct n-grams over all n-grams among the first `budget` tokens of the responses in a fixed shuffled order.

    The ratio falls with the amount of text, so only figures with the same budget can be compared (`token_budget`). The
    order depends on the number of responses and the seed; n-grams are within one response; the last one may be cut.
    (Li et al. 2016, distinct-n.)

    Args:
        responses: tokens of each response, ids or words.

    Returns:
        {"distinct_1": ..., "distinct_2": ..., "distinct_4": ..., "tokens": budget}; 0 if there is no n-gram.

    Raises:
        ValueError: there are fewer tokens than the budget, or the budget is below 1.
    """
    total = sum(len(response) for response in responses)
    if not 1 <= budget <= total:
        raise ValueError(f"found {total} tokens in {len(responses)} responses, expected at least the budget {budget}")
    kept, left = [], budget
    for place in np.random.default_rng(seed).permutation(len(responses)):
        kept.append(list(responses[place])[:left])
        left -= len(kept[-1])
        if not left:
            break
    found: dict[str, float] = {}
    for order in orders:
        grams = [tuple(ids[i : i + order]) for ids in kept for i in range(len(ids) - order + 1)]
        found[f"distinct_{order}"] = len(set(grams)) / len(grams) if grams else 0.0
    found["tokens"] = budget
    return found


def self_bleu(responses: Sequence[Sequence[str]]) -> float:
    """Mean over responses of BLEU against the other responses to the same prompt, 0 (all differ) to 1 (all equal).

    (Zhu et al. 2018, Texygen; BLEU by sacrebleu, Post 2018, settings in SELF_BLEU.) It rises with the number of
    responses per prompt, so compare only equal numbers. An empty response counts 1 beside another empty one, else 0.

    Args:
        responses: texts, one list per prompt, at least two in each.

    Raises:
        ValueError: there are no prompts, or a prompt has fewer than two responses.
    """
    if not responses or min(len(texts) for texts in responses) < 2:
        raise ValueError("self-BLEU: found a prompt with fewer than two responses, expected at least two for each")
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(**SELF_BLEU)
    scores = []
    for texts in responses:
        for i, text in enumerate(texts):
            others = [other for j, other in enumerate(texts) if j != i]
            if text in others:
                scores.append(1.0)
            elif not text.strip():
                scores.append(0.0)
            else:
                scores.append(bleu.sentence_score(text, others).score / 100)
    return float(np.mean(scores))
