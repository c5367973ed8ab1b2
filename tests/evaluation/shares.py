"""Shares whose truth is known: K yes-or-no answers on each of P prompts, alike within a prompt as much as one says."""

from __future__ import annotations

import numpy as np

from rlhf_pipeline.evaluation.statistics import cluster_mean


def drawn(draw: np.random.Generator, count: int, prompts: int, p: float, alike: float, samples: int = 4) -> np.ndarray:
    """(count, P) means over a prompt's answers: beta-binomial with mean p and correlation `alike` within a prompt."""
    shape = (count, prompts)
    chance = p if alike == 0 else draw.beta(p * (1 / alike - 1), (1 - p) * (1 / alike - 1), shape)
    return draw.binomial(samples, chance, shape) / samples


def covers(means: np.ndarray, p: float) -> float:
    """How often the interval of `cluster_mean` holds p, over the rows of (count, P)."""
    found = (cluster_mean(row, range(len(row)), share=True) for row in means)
    return sum(one.low <= p <= one.high for one in found) / len(means)
