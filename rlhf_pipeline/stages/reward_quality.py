"""The quality of a reward model: its scores, its metrics on held-out pairs, and those of the baselines."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.data.examples import Example, parts_of, texts_and_ranks
from rlhf_pipeline.evaluation.preference_metrics import (
    accuracy,
    bayes_accuracy,
    longer_wins,
    pair_differences,
    preference_metrics,
    tfidf_bradley_terry,
)
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import RewardModel
from rlhf_pipeline.rollout.rewards import ModelReward
from rlhf_pipeline.rollout.scoring import by_example, score
from rlhf_pipeline.training.tensor_cache import read_tensor, write_tensor

BASELINES = ("longer_wins", "tfidf")


def score_examples(
    model: RewardModel,
    examples: Sequence[Example],
    *,
    responses_at_once: int,
    memory: Memory | None = None,
    device: torch.device,
) -> list[list[float]]:
    """Scores of all completions of each example, in fp32, computed by `score`."""
    source = ModelReward("reward model", model, device)
    return by_example(score(source.score, examples, responses_at_once=responses_at_once, memory=memory), examples)


def baseline_differences(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, list[float]]:
    """Score differences of the baselines on held-out pairs: "longer wins", and TF-IDF with Bradley-Terry fitted on
    `train`."""

    def texts(examples: Sequence[Example]) -> list[tuple[str, str]]:
        return [(e.completion_texts[i], e.completion_texts[j]) for e in examples for i, j in e.untied()]

    pairs = [(e.completions[i], e.completions[j]) for e in held_out for i, j in e.untied()]
    longer = longer_wins([better for better, _ in pairs], [worse for _, worse in pairs])
    return dict(zip(BASELINES, (longer, tfidf_bradley_terry(texts(train), texts(held_out))), strict=True))


def cached_baseline_differences(
    train: Sequence[Example], held_out: Sequence[Example], cache: Path
) -> dict[str, list[float]]:
    """`baseline_differences` with a cache: they depend only on the completions, which many runs share."""
    pairs_of = [[_completions_digest(examples), list(texts_and_ranks(examples))] for examples in (train, held_out)]
    key = [version("scikit-learn"), pairs_of]
    name = sha256(json.dumps(key, ensure_ascii=False).encode(errors="surrogatepass")).hexdigest()
    path = cache / f"baselines-{name[:32]}.safetensors"
    stored, pairs = read_tensor(path), sum(len(example.untied()) for example in held_out)
    if stored is not None and stored.shape == (len(BASELINES), pairs):
        return dict(zip(BASELINES, stored.tolist(), strict=True))
    found = baseline_differences(train, held_out)
    write_tensor(path, torch.tensor([found[name] for name in BASELINES], dtype=torch.float64))
    return found


def _completions_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of the completions of examples, with their boundaries."""
    digest = sha256()
    for (prompt, *sizes), ids in parts_of(examples):
        digest.update(array("q", [len(sizes), *sizes]).tobytes())
        digest.update(ids[prompt:].tobytes())
    return digest.hexdigest()


def baseline_accuracies(
    differences: Mapping[str, Sequence[float]], held_out: Sequence[Example]
) -> dict[str, dict[str, float]]:
    """Held-out accuracy of baselines, with a 95 % interval."""
    clusters = [example.prompt_key for example in held_out for _ in example.untied()]
    return {
        name: {"accuracy": estimate.mean, "accuracy_low": estimate.low, "accuracy_high": estimate.high}
        for name, estimate in ((name, accuracy(values, clusters)) for name, values in differences.items())
    }


def baselines(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Held-out accuracy of both baselines, with a 95 % interval."""
    return baseline_accuracies(baseline_differences(train, held_out), held_out)


def describe_pairs(scores: Sequence[Sequence[float]], held_out: Sequence[Example]) -> dict[str, Any]:
    """Accuracy, calibration and the labels' ceiling on held-out pairs, and mean scores of ended and cut responses."""
    differences, clusters = pair_differences(scores, held_out)
    metrics: dict[str, Any] = preference_metrics(differences, clusters)
    labels = [example.label_probability for example in held_out for _ in example.untied()]
    ceiling = bayes_accuracy(labels, clusters)
    if ceiling is not None:
        metrics["bayes_accuracy"] = ceiling
    for name, wanted in (("ended", True), ("cut", False)):
        values = [
            score
            for example, row in zip(held_out, scores, strict=True)
            for score, ended in zip(row, example.ended, strict=True)
            if ended is wanted
        ]
        if values:
            metrics[f"mean_score_{name}"] = sum(values) / len(values)
    return metrics
