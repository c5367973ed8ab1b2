"""In-context DPO as functions of numbers and token ids: retrieval, contrast, choice without copies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

import numpy as np

K1, B = 1.5, 0.75
COPY = 0.9
"""From this similarity on, a response counts as a copy of a demonstration's."""


def words(text: str) -> list[str]:
    """The words of a text in lower case, by which demonstrations are retrieved."""
    return re.findall(r"\w+", text.lower())


def bm25(
    queries: Sequence[Sequence[str]], documents: Sequence[Sequence[str]], *, k1: float = K1, b: float = B
) -> Iterator[np.ndarray]:
    """Yield the Okapi BM25 score of every document for each query, (N,).

        score(q, d) = sum over distinct t in q of idf(t) f(t, d) (k1 + 1) / (f(t, d) + k1 (1 - b + b |d| / mean |d|))
        idf(t) = log(1 + (N - n(t) + 1/2) / (n(t) + 1/2))

    with f(t, d) the count of t in d and n(t) the number of documents with t (Robertson and Zaragoza 2009, section 3.4;
    the idf of Lucene, which is never negative).
    """
    lengths = np.array([len(document) for document in documents], dtype=np.float64)
    norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-12))
    postings: dict[str, tuple[list[int], list[int]]] = {}
    for number, document in enumerate(documents):
        for term, count in Counter(document).items():
            places, counts = postings.setdefault(term, ([], []))
            places.append(number)
            counts.append(count)
    for query in queries:
        scores = np.zeros(len(documents))
        for term in dict.fromkeys(query):
            places, counts = postings.get(term, ([], []))
            if places:
                found = np.array(counts, dtype=np.float64)
                idf = np.log1p((len(documents) - len(places) + 0.5) / (len(places) + 0.5))
                scores[places] += idf * found * (k1 + 1) / (found + norm[places])
        yield scores


def cosines(queries: np.ndarray, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the cosine of every document (N, D) with each query (P, D), (N,): q . d / (|q| |d|), or 0 for a zero."""
    sizes = np.linalg.norm(documents, axis=1)
    for query in queries:
        yield documents @ query / np.maximum(sizes * np.linalg.norm(query), 1e-300)


def nearest(scores: np.ndarray, count: int) -> list[int]:
    """The numbers of the `count` documents with the highest scores, the best last; of equal ones the first."""
    rounded = np.round(scores, 9)  # the order of a sum breaks no tie
    return np.argsort(-rounded, kind="stable")[:count][::-1].tolist()


def is_copy(response: Sequence[int], others: Sequence[Sequence[int]], threshold: float = COPY) -> bool:
    """Whether a response is equal or nearly equal to one of the others: 2 M / (|a| + |b|) >= threshold.

    M is the number of tokens in matching blocks (Ratcliff and Obershelp; `difflib`). Tokens are without end tokens.
    """
    matcher: SequenceMatcher[int] = SequenceMatcher(None, (), response, autojunk=False)
    for other in others:
        matcher.set_seq1(other)
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        if all(bound() >= threshold for bound in bounds):
            return True
    return False


def choose(scores: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """The number of the candidate with the highest score that is no copy; 0 where all candidates are copies.

    Args:
        scores: (..., n) contrasts. copies: (..., n) bool.

    Returns:
        (...,); of equal scores the first.
    """
    return np.where(copies, -np.inf, scores).argmax(-1)
