"""The true reward of `make reviews`: log-odds of a sentiment classifier on the prompt with its continuation.

The classifier is TF-IDF of words and word pairs with logistic regression (scikit-learn), fitted on sentences about
films that no model of the experiment reads. Configs name it `scripts.sentiment:log_odds`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOLD_OUT_EVERY = 5
"""Every fifth sentence is held out, so the accuracy is that of the same classifier that gives the reward."""


def read_sentences(path: Path) -> tuple[list[str], list[int]]:
    """Sentences with their labels, 1 for positive."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; create it with make reviews DATA=FOLDER, or set REVIEWS_DIR to another folder"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def fit(texts: Sequence[str], labels: Sequence[int]) -> Any:
    """A pipeline of TF-IDF and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # C is chosen by the likelihood on four folds of the fitted sentences (2: .518 nats, 4: .495, 8: .487, 16: .492), so
    # that the log-odds are calibrated.
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\S+")
    return make_pipeline(words, LogisticRegression(C=8.0, max_iter=1000)).fit(list(texts), list(labels))


def held_out(items: Sequence[Any], kept: bool) -> list[Any]:
    """The sentences that are held out, or with `kept` those that are not."""
    return [item for number, item in enumerate(items) if (number % HOLD_OUT_EVERY != 0) == kept]


@functools.lru_cache(maxsize=1)
def classifier(path: Path) -> Any:
    """The classifier fitted on four fifths of the sentences of a file."""
    texts, labels = read_sentences(path)
    return fit(held_out(texts, True), held_out(labels, True))


def quality(path: Path) -> dict[str, float]:
    """Accuracy, half-width of its 95 % interval, and mean negative log-likelihood in nats, on held-out sentences."""
    import numpy as np

    texts, labels = read_sentences(path)
    texts, truth = held_out(texts, False), np.array(held_out(labels, False))
    odds = classifier(path).decision_function(texts)
    right = (odds > 0) == (truth == 1)
    nll = np.logaddexp(0.0, np.where(truth == 1, -odds, odds))
    half = 1.96 * right.std() / len(right) ** 0.5
    return {
        "sentences": len(right),
        "accuracy": float(right.mean()),
        "half_width": float(half),
        "nll": float(nll.mean()),
    }


def log_odds(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """log P(positive) - log P(negative) of each prompt with its continuation."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    folder = os.environ.get("REVIEWS_DIR") or Path(__file__).parent.parent / "build/reviews"  # of scripts/reviews.py
    return classifier(Path(folder) / "sentences.jsonl").decision_function(texts).tolist()
