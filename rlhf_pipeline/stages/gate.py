"""The gate of a reward model: what it has to beat on held-out pairs before PPO on it means anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_pipeline.evaluation.preference_metrics import accuracy
from rlhf_pipeline.evaluation.statistics import cluster_mean
from rlhf_pipeline.registry.references import Resolved

FEW_PROMPTS = 5
COIN = "coin"
ROUNDING = 1e-9
"""Differences in accuracy up to this are rounding."""
NO_HELD_OUT = "it has no gate: no held-out pairs were seen when it was trained, or an earlier release trained it"
UNKNOWN = "it has no gate: it is not of this registry, and how it does on held-out pairs is not known"
BELIEVE = "what PPO makes of it says little"


def gate_of(
    differences: Sequence[float], rivals: Mapping[str, Sequence[float]], clusters: Sequence[str]
) -> dict[str, Any]:
    """Set a reward model against baselines on the same pairs.

    A baseline is beaten by a strictly higher accuracy, a coin by an interval above one half. An accuracy that only
    equals a baseline's does not beat it: a model that has learned that baseline and nothing else has it too. The
    interval of the difference is that of the paired differences in being right (ties one half), clustered by prompt;
    where it contains 0 the reason says that the baseline is beaten, but not beyond doubt.

    Args:
        differences: score(chosen) - score(rejected) of the reward model. rivals: the same of each baseline.

    Returns:
        passed; beats {baseline: bool}; differences {baseline: {mean, low, high}} in accuracy; reason, one sentence.
    """
    own, against = _right(differences), accuracy(differences, clusters)
    gaps = {name: cluster_mean(own - _right(theirs), clusters) for name, theirs in rivals.items()}
    beats = {COIN: against.low > 0.5} | {name: gap.mean > ROUNDING for name, gap in gaps.items()}
    parts = [f"held-out accuracy {against}"]
    if not beats[COIN]:
        parts.append("one half is not below its interval: it cannot be told from a coin")
    for name, gap in gaps.items():
        verb = "beats" if beats[name] else "does not beat"
        doubt = " (the interval contains 0: not beyond doubt)" if gap.low <= 0 <= gap.high else ""
        if not beats[name] and gap.mean >= -ROUNDING:
            doubt = " (as accurate as that, and no more)"
        parts.append(f"{verb} {name}, difference {gap}{doubt}")
    few = against.clusters < FEW_PROMPTS
    if few:
        parts = [f"only {against.clusters} held-out prompts, expected at least {FEW_PROMPTS}: these figures say little"]
    return {
        "passed": not few and all(beats.values()),
        "beats": beats,
        "differences": {name: {"mean": gap.mean, "low": gap.low, "high": gap.high} for name, gap in gaps.items()},
        "reason": "; ".join(parts),
    }


def _right(differences: Sequence[float]) -> np.ndarray:
    """1 where the chosen response scores higher, one half for a tie, else 0."""
    return (np.sign(np.asarray(differences, dtype=np.float64)) + 1) / 2


def repeat_gates(
    models: Sequence[Resolved], say: Callable[..., None], *, what: str = "reward model", believe: str = BELIEVE
) -> None:
    """Say which reward models failed their gate, or never stood before it; one line each."""
    for model in models:
        gate = None if model.manifest is None else model.manifest.metrics.get("gate")
        if isinstance(gate, Mapping) and gate.get("passed"):
            continue
        if isinstance(gate, Mapping):
            why = f"failed its gate: {gate.get('reason')}"
        else:
            why = UNKNOWN if model.manifest is None else NO_HELD_OUT
        say(f"WARNING: {what} {model.label}: {why}; {believe}", style="yellow")
