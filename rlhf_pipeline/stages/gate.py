"""The gate of a reward model: the baselines that it must beat on held-out pairs before PPO on it is meaningful."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_pipeline.evaluation.preference_metrics import accuracy
from rlhf_pipeline.evaluation.statistics import cluster_mean, difference_of_means
from rlhf_pipeline.registry.references import Resolved

FEW_PROMPTS = 5
COIN = "coin"
ROUNDING = 1e-9
"""Differences in accuracy up to this are rounding."""
NO_HELD_OUT = "it has no gate: it was trained without held-out pairs or by an earlier release"
UNKNOWN = "it has no gate: it is not in this registry, so its accuracy on held-out pairs is unknown"
BELIEVE = "the results of PPO on it mean little"
CUT = "cut_minus_ended"
"""The metric of a reward model's manifest that `cut_minus_ended` gives."""
CUT_REMEDY = "missing_eos_penalty of ppo lowers their score, and a larger response_length cuts fewer"


def gate_of(
    differences: Sequence[float], rivals: Mapping[str, Sequence[float]], clusters: Sequence[str]
) -> dict[str, Any]:
    """Compare a reward model with baselines on the same pairs.

    A reward model beats a baseline if its accuracy is strictly higher, and a coin if its interval lies above one half.
    Equal accuracy is not enough: a model that has learned only the baseline reaches it too. The interval of the
    difference is that of the paired differences in correctness (ties count one half), clustered by prompt. If it
    contains 0, the reason states that the result is not certain.

    Args:
        differences: score(chosen) - score(rejected) of the reward model, one per pair.
        rivals: the same differences for each baseline.
        clusters: the prompt of each pair.

    Returns:
        passed; beats {baseline: bool}; differences {baseline: {mean, low, high}} in accuracy; reason, one sentence.
    """
    own, against = _right(differences), accuracy(differences, clusters)
    gaps = {name: cluster_mean(own - _right(theirs), clusters) for name, theirs in rivals.items()}
    beats = {COIN: against.low > 0.5} | {name: gap.mean > ROUNDING for name, gap in gaps.items()}
    parts = [f"held-out accuracy {against}"]
    if not beats[COIN]:
        parts.append("its interval is not above one half: it may be no better than a coin")
    for name, gap in gaps.items():
        verb = "beats" if beats[name] else "does not beat"
        doubt = " (the interval contains 0: not certain)" if gap.low <= 0 <= gap.high else ""
        if not beats[name] and gap.mean >= -ROUNDING:
            doubt = " (equal accuracy)"
        parts.append(f"{verb} {name}, difference {gap}{doubt}")
    few = against.clusters < FEW_PROMPTS
    if few:
        parts = [f"found {against.clusters} held-out prompts, expected at least {FEW_PROMPTS}: too few for a result"]
    return {
        "passed": not few and all(beats.values()),
        "beats": beats,
        "differences": {name: {"mean": gap.mean, "low": gap.low, "high": gap.high} for name, gap in gaps.items()},
        "reason": "; ".join(parts),
    }


def _right(differences: Sequence[float]) -> np.ndarray:
    """1 where the chosen response scores higher, one half for a tie, else 0."""
    return (np.sign(np.asarray(differences, dtype=np.float64)) + 1) / 2


def cut_minus_ended(scores: Sequence[float], ended: Sequence[bool], cut_in_training: int) -> dict[str, float] | None:
    """How much higher a reward model scores sampled responses that the limit cut than those that ended.

    Recorded pairs seldom have cut responses: longer ones are dropped. What a reward model says of them is then chance,
    and PPO samples many.

    Args:
        cut_in_training: the number of cut responses among those it was trained on.

    Returns:
        mean, low, high of the difference of both means, the numbers `cut` and `ended` of samples, `cut_in_training`;
        None if there are fewer than 2 samples of a kind.
    """
    cut = [score for score, whole in zip(scores, ended, strict=True) if not whole]
    whole = [score for score, whole in zip(scores, ended, strict=True) if whole]
    if min(len(cut), len(whole)) < 2:
        return None
    found = difference_of_means(cut, whole)
    counts = {"cut": len(cut), "ended": len(whole), "cut_in_training": cut_in_training}
    return {"mean": found.mean, "low": found.low, "high": found.high, **counts}


def prefers_cut(found: Mapping[str, Any] | None) -> str | None:
    """What to tell about a reward model that scores cut responses higher and has never learned to; else None."""
    if found is None or found["low"] <= 0 or found["cut_in_training"]:
        return None
    interval = f"[{found['low']:.3g}, {found['high']:.3g}]"
    return (
        f"scores responses that the limit cut {found['mean']:.3g} {interval} higher than "
        "ended ones, though it was trained on none that were cut: PPO on it learns not to end"
    )


def repeat_gates(
    models: Sequence[Resolved], say: Callable[..., None], *, what: str = "reward model", believe: str = BELIEVE
) -> None:
    """Log one line for each reward model that failed its gate or has no gate."""
    for model in models:
        gate = None if model.manifest is None else model.manifest.metrics.get("gate")
        if isinstance(gate, Mapping) and gate.get("passed"):
            continue
        if isinstance(gate, Mapping):
            why = f"failed its gate: {gate.get('reason')}"
        else:
            why = UNKNOWN if model.manifest is None else NO_HELD_OUT
        say(f"WARNING: {what} {model.label}: {why}; {believe}", style="yellow")


def warn_of_cut_responses(models: Sequence[Resolved], say: Callable[..., None]) -> None:
    """Log one line for each reward model that scores cut responses higher than ended ones."""
    for model in models:
        metrics = {} if model.manifest is None else model.manifest.metrics
        if told := prefers_cut(metrics.get(CUT)):
            say(f"WARNING: reward model {model.label} {told}; {CUT_REMEDY}", style="yellow")
