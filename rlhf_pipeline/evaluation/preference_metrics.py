"""Quality of a scorer of preference pairs: accuracy, calibration, and the baselines that it has to beat.

A ranking counts as its untied pairs. Every prompt has the same weight, however many pairs it has; intervals are
clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.statistics import (
    Estimate,
    Numbers,
    cluster_mean,
    clustered,
    prompt_codes,
    prompt_weights,
    student_quantile,
)

CALIBRATION_BINS = 15


def pair_differences(scores: Sequence[Sequence[float]], examples: Sequence[Example]) -> tuple[list[float], list[str]]:
    """score(better) - score(worse) of every untied pair of the examples, and the prompt of each.

    A labelled response is set against a score of 0: its score if it is desirable, else the negated score.

    Args:
        scores: for each example one score per completion, in its order; further scores are ignored.
    """
    found = [
        (row[better] - row[worse], example.prompt_key)
        for row, example in zip(scores, examples, strict=True)
        for better, worse in example.untied()
    ]
    found += [
        (row[0] if example.desirable else -row[0], example.prompt_key)
        for row, example in zip(scores, examples, strict=True)
        if example.desirable is not None
    ]
    return [difference for difference, _ in found], [prompt for _, prompt in found]


def _correctness(differences: Numbers) -> np.ndarray:
    difference = np.asarray(differences, dtype=np.float64)
    return (difference > 0) + 0.5 * (difference == 0)


def accuracy(differences: Numbers, clusters: Sequence[str]) -> Estimate:
    """Share of pairs with score(chosen) > score(rejected), ties one half, interval clustered by prompt."""
    return cluster_mean(_correctness(differences), clusters, share=True)


def expected_calibration_error(
    differences: Numbers, clusters: Sequence[str] | None = None, bins: int = CALIBRATION_BINS
) -> float:
    """ECE of the confidence max(p, 1 - p), p = sigma(difference), against correctness, in bins of equally many pairs.

    ECE = sum_b w_b |mean correctness_b - mean confidence_b|, w_b the bin's share of the weight (Guo et al. 2017, eq. 3)

    Args:
        clusters: the prompt of each pair, its weight is then 1 / (pairs of its prompt); by default weights are equal.
    """
    weights = _weights(differences, clusters)
    found = zip(_bins(differences, bins), reliability_bins(differences, clusters, bins), strict=True)
    return float(sum(weights[group].sum() * abs(right - sure) for group, (sure, right, _) in found))


def reliability_bins(
    differences: Numbers, clusters: Sequence[str] | None = None, bins: int = CALIBRATION_BINS
) -> list[tuple[float, float, int]]:
    """(mean confidence, mean correctness, pairs) of bins of equally many pairs, by rising confidence max(p, 1 - p).

    The bins of a calibrated scorer are on the diagonal of correctness against confidence; a tie counts as half correct.

    Args:
        clusters: see `expected_calibration_error`.
    """
    confidence, correct = _confidence(differences), _correctness(differences)
    weights = _weights(differences, clusters)
    return [
        (
            float(np.average(confidence[group], weights=weights[group])),
            float(np.average(correct[group], weights=weights[group])),
            len(group),
        )
        for group in _bins(differences, bins)
    ]


def _confidence(differences: Numbers) -> np.ndarray:
    return 1 / (1 + np.exp(-np.abs(np.asarray(differences, dtype=np.float64))))


def _weights(differences: Numbers, clusters: Sequence[str] | None) -> np.ndarray:
    return prompt_weights(range(len(differences)) if clusters is None else clusters)


def _bins(differences: Numbers, bins: int) -> list[np.ndarray]:
    """Indices of the pairs of each bin, by rising confidence; none is empty."""
    order = np.argsort(_confidence(differences), kind="stable")
    return [group for group in np.array_split(order, bins) if len(group)]


def calibration_slope(differences: Numbers, clusters: Sequence[str]) -> Estimate | None:
    """Maximum-likelihood s of P(label) = sigma(s x difference), with an interval clustered by prompt.

        sum over pairs of w d sigma(-s d) = 0,    d = r_w - r_l,    w = 1 / pairs of the prompt

    It is the slope of a logistic regression of the labels through the origin (Cox 1958). 1: the rewards are on the
    labels' own scale; above 1 they are too small, below 1 too large; rewards times c have the slope s / c. The interval
    is Student's t over prompts with the sandwich variance (Liang and Zeger 1986, eq. 4).

    Args:
        differences: score(chosen) - score(rejected), (pairs,). clusters: the prompt of each pair.

    Returns:
        None if the maximum is not finite: all pairs are ordered correctly, all wrongly, or all are ties.
    """
    from scipy.special import expit

    difference = np.asarray(differences, dtype=np.float64)
    if not ((difference > 0).any() and (difference < 0).any()):
        return None
    codes = prompt_codes(clusters)
    weights = 1.0 / np.bincount(codes)[codes]
    scale = float(np.abs(difference).max())
    d = difference / scale

    def steps(s: float) -> np.ndarray:
        return weights * d * expit(-s * d)

    # The sum falls in s, from above 0 to below it, since pairs of both signs are there.
    low, high = -1.0, 1.0
    while steps(low).sum() < 0:
        low *= 2
    while steps(high).sum() > 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if steps(middle).sum() > 0 else (low, middle)
    s, groups = (low + high) / 2, int(codes.max()) + 1
    by_prompt = np.bincount(codes, weights=steps(s))
    curvature = float((weights * d**2 * expit(s * d) * expit(-s * d)).sum())
    half = math.inf
    if groups > 1 and curvature > 0:
        error = math.sqrt(groups / (groups - 1) * float((by_prompt**2).sum())) / curvature
        half = student_quantile(groups - 1) * error
    return Estimate(s / scale, (s - half) / scale, (s + half) / scale, len(d), groups, "t")


def compare_scorers(differences: Numbers, others: Numbers, clusters: Sequence[str]) -> dict[str, Any]:
    """Accuracy of one scorer minus that of another on the same pairs, with a two-sided p-value.

    With one pair per prompt p is McNemar's, exact: of the pairs on which the two differ in correctness, the number on
    which the first is better is binomial(., 1/2) if they are equally good (McNemar 1947; a tie counts as half right,
    so that this is the sign test). With several, pairs of one prompt depend on each other, and p is of the clustered
    interval. The interval is clustered by prompt in either case and need not agree with McNemar's p at the border.

    Args:
        differences, others: score(chosen) - score(rejected) by each of the two, (pairs,). clusters: prompt of each.

    Returns:
        {"method": "mcnemar" or "clustered bootstrap", "difference": estimate as a dict, "p": number or None}; the
        method is "t over prompts" below 50 prompts.

    Raises:
        ValueError: for lists of different length, or without pairs.
    """
    if len(differences) != len(others):
        raise ValueError(f"found {len(differences)} and {len(others)} pairs, expected the same pairs in both")
    better = _correctness(differences) - _correctness(others)
    estimate, p = clustered(better, clusters)
    method = "clustered bootstrap" if estimate.method == "bootstrap" else "t over prompts"
    if len(set(clusters)) == len(clusters):
        from scipy.stats import binomtest

        ahead, behind = int((better > 0).sum()), int((better < 0).sum())
        p = float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
        method = "mcnemar"
    return {"method": method, "difference": estimate.as_dict(), "p": p}


def preference_metrics(differences: Numbers, clusters: Sequence[str]) -> dict[str, float]:
    """Accuracy with interval, NLL, Brier score and ECE of score differences (chosen minus rejected).

    All are means in which every prompt counts the same.
    """
    difference = np.asarray(differences, dtype=np.float64)
    estimate = accuracy(difference, clusters)
    probability, weights = 1 / (1 + np.exp(-difference)), prompt_weights(clusters)
    return {
        "accuracy": estimate.mean,
        "accuracy_low": estimate.low,
        "accuracy_high": estimate.high,
        "pairs": estimate.n,
        "prompts": estimate.clusters,
        "nll": float(weights @ np.logaddexp(0.0, -difference)),
        "brier": float(weights @ (1 - probability) ** 2),
        "ece": expected_calibration_error(difference, clusters),
    }


def bayes_accuracy(label_probabilities: Sequence[float | None], clusters: Sequence[str]) -> float | None:
    """The best possible accuracy on noisy labels: mean of max(p, 1 - p), p = P(label); None if p is not always known.

    It is averaged like `accuracy`, so that the two can be compared.
    """
    known = [p for p in label_probabilities if p is not None]
    if not known or len(known) < len(label_probabilities):
        return None
    return cluster_mean([max(p, 1 - p) for p in known], clusters).mean


def longer_wins(chosen: Sequence[Sized], rejected: Sequence[Sized]) -> list[float]:
    """Score differences of the baseline "the longer response is better", in tokens (of texts in characters)."""
    return [float(len(one) - len(other)) for one, other in zip(chosen, rejected, strict=True)]


def tfidf_bradley_terry(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> list[float]:
    """Score differences on `test` of a Bradley-Terry model on TF-IDF features fitted on `train`.

    sigma(w . [x(chosen) - x(rejected)]) by L2-regularised logistic regression without intercept; each pair is
    used in both orders. Texts are (chosen, rejected). Words are runs of letters or signs, so that texts of any
    vocabulary have features.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if not train or not test:
        return [0.0] * len(test)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=20_000, token_pattern=r"(?u)\w+|[^\w\s]+"
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
