"""Best-of-n: the baseline that trains nothing."""

from __future__ import annotations

from math import comb, log

import numpy as np


def best_of_n(chooser: np.ndarray, judged: np.ndarray, n: int) -> np.ndarray:
    """Expected figure of the best of n samples, for each prompt, from N >= n samples of it.

    With the samples sorted by the chooser, the i-th smallest is the best of a random n-subset with probability
    C(i-1, n-1) / C(N, n). Averaged over all subsets this is unbiased for every n at once; responses that the
    chooser scores the same share their weight.

    Args:
        chooser: (P, N) scores that choose. judged: (P, N) the figure of interest.

    Returns:
        (P,).

    Raises:
        ValueError: when n is not in 1 ... N.
    """
    prompts, total = chooser.shape
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} needs at least {n} samples per prompt, found {total}")
    weights = np.array([comb(i - 1, n - 1) / comb(total, n) for i in range(1, total + 1)])
    result = np.empty(prompts)
    for row in range(prompts):
        order = np.argsort(chooser[row], kind="stable")
        _, group = np.unique(chooser[row][order], return_inverse=True)
        shared = np.bincount(group, weights) / np.bincount(group)
        result[row] = float(np.sum(shared[group] * judged[row][order]))
    return result


def kl_bound(n: int) -> float:
    """Upper bound of KL(best-of-n || reference) in nats: log n - (n - 1) / n.

    A bound, not the value: it is loose where responses repeat (Beirami et al. 2024).
    """
    return log(n) - (n - 1) / n
