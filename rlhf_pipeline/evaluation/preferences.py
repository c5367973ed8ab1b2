"""How good a scorer of preference pairs is: accuracy, calibration, and the baselines it has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_pipeline.evaluation.statistics import Estimate, cluster_mean

CALIBRATION_BINS = 15


def accuracy(differences: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """Share of pairs with score(chosen) > score(rejected), ties one half, interval clustered by prompt."""
    difference = np.asarray(differences, dtype=np.float64)
    return cluster_mean((difference > 0) + 0.5 * (difference == 0), clusters, share=True)


def expected_calibration_error(differences: Sequence[float], bins: int = CALIBRATION_BINS) -> float:
    """ECE of the confidence max(p, 1 - p), p = sigma(difference), against correctness, in equal-mass bins.

    ECE = sum_b |b| / n * |mean correctness_b - mean confidence_b|        (Guo et al. 2017, eq. 3)
    """
    difference = np.asarray(differences, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    correct = (difference > 0) + 0.5 * (difference == 0)
    order = np.argsort(confidence, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    gaps = [len(group) * abs(correct[group].mean() - confidence[group].mean()) for group in groups]
    return float(sum(gaps) / len(difference))


def preference_metrics(differences: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """Accuracy with interval, NLL, Brier score and ECE of score differences (chosen minus rejected)."""
    difference = np.asarray(differences, dtype=np.float64)
    estimate = accuracy(difference, clusters)
    probability = 1 / (1 + np.exp(-difference))
    return {
        "accuracy": estimate.mean,
        "accuracy_low": estimate.low,
        "accuracy_high": estimate.high,
        "pairs": estimate.n,
        "prompts": estimate.clusters,
        "nll": float(np.logaddexp(0.0, -difference).mean()),
        "brier": float(((1 - probability) ** 2).mean()),
        "ece": expected_calibration_error(difference),
    }


def bayes_accuracy(label_probabilities: Sequence[float | None], clusters: Sequence[str]) -> float | None:
    """The labels' own ceiling: mean of max(p, 1 - p) where P(label) = p is known for every pair, else None.

    Averaged as `accuracy` is, so that the two can be compared.
    """
    if not label_probabilities or any(p is None for p in label_probabilities):
        return None
    return cluster_mean([max(p, 1 - p) for p in label_probabilities], clusters).mean


def longer_wins(chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]) -> list[float]:
    """Score differences of the baseline "the longer response is better", in tokens."""
    return [float(len(one) - len(other)) for one, other in zip(chosen, rejected, strict=True)]


def tfidf_bradley_terry(
    train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]], *, max_features: int = 20_000
) -> list[float]:
    """Score differences on `test` of a Bradley-Terry model on TF-IDF features fitted on `train`.

    sigma(w . [x(chosen) - x(rejected)]) by L2-regularised logistic regression without intercept; each pair is
    shown both ways round. Texts are (chosen, rejected). Words are runs of letters or signs, so that texts of any
    vocabulary have features.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if not train or not test:
        return [0.0] * len(test)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=max_features, token_pattern=r"(?u)\w+|[^\w\s]+"
    )
    try:
        vectorizer.fit([text for pair in train for text in pair])
    except ValueError:  # not one word in all texts: nothing to learn from
        return [0.0] * len(test)

    def features(pairs: Sequence[tuple[str, str]]):
        return vectorizer.transform([a for a, _ in pairs]) - vectorizer.transform([b for _, b in pairs])

    difference = features(train)
    labels = np.r_[np.ones(len(train)), np.zeros(len(train))]
    model = LogisticRegression(fit_intercept=False, max_iter=300)
    model.fit(vstack([difference, -difference]), labels)
    return [float(value) for value in features(test) @ model.coef_[0]]
