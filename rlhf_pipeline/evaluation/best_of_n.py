"""Best-of-n: the baseline without training."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, log

import numpy as np

MASS_TOLERANCE = 1e-5


def best_of_n(chooser: np.ndarray, measured: np.ndarray, n: int) -> np.ndarray:
    """Expected figure of the best of n samples for each prompt, from N >= n samples of that prompt.

    With the samples sorted by the chooser, the i-th smallest is the best of a random n-subset with probability
    C(i-1, n-1) / C(N, n). The average over all subsets is unbiased for every n; responses with equal
    scores of the chooser share their weight.

    Args:
        chooser: (P, N) scores that choose. measured: (P, N) the figure of interest.

    Returns:
        (P,).

    Raises:
        ValueError: n is not in 1 ... N.
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
        result[row] = float(np.sum(shared[group] * measured[row][order]))
    return result


def kl_bound(n: int) -> float:
    """Upper bound of KL(best-of-n || reference) in nats: log n - (n - 1) / n.

    This is a bound, not the value; it is loose if responses repeat (Beirami et al. 2024).
    """
    return log(n) - (n - 1) / n


@dataclass(frozen=True)
class ChooserLaw:
    """The distribution of a chooser's values under the reference, for prompts whose responses can all be listed.

    log_mass: (U,) log-probability of each distinct value, in rising order. log_below: (U,) log F, the log-probability
    of all values up to and including it. measured: (U,) mean of the measured figure among the responses of that value.
    """

    log_mass: np.ndarray
    log_below: np.ndarray
    measured: np.ndarray

    @classmethod
    def of(cls, chooser: np.ndarray, measured: np.ndarray, ref_logprobs: np.ndarray) -> ChooserLaw:
        """Make the law from three arrays over all responses of one prompt, (L,) each.

        Raises:
            ValueError: the lengths differ, or the probabilities do not sum to 1 within 1e-5.
        """
        values, figure, logs = (np.asarray(x, dtype=np.float64) for x in (chooser, measured, ref_logprobs))
        probability = np.exp(logs)
        if not (values.shape == figure.shape == logs.shape) or not abs(probability.sum() - 1) <= MASS_TOLERANCE:
            raise ValueError(
                f"found arrays of shape {values.shape}, {figure.shape}, {logs.shape} and a probability of "
                f"{probability.sum():.7f} in all, expected equal shapes and 1"
            )
        probability = probability / probability.sum()
        distinct, place = np.unique(values, return_inverse=True)
        mass = np.bincount(place, weights=probability, minlength=len(distinct))
        total = np.bincount(place, weights=probability * figure, minlength=len(distinct))
        kept = mass > 0
        mass, total = mass[kept], total[kept]
        # F near 1 is computed as 1 minus the mass above it, to keep all digits; so is its logarithm.
        above = np.append(np.cumsum(mass[:0:-1])[::-1], 0.0)
        below = np.cumsum(mass)
        log_below = np.where(above < 0.5, np.log1p(-np.minimum(above, 0.5)), np.log(below))
        return cls(np.log(mass), log_below, total / mass)

    def best_of(self, n: int) -> tuple[float, float]:
        """(expected measured figure, KL to the reference in nats) of the best of n independent samples, exactly.

            P(best <= v) = F(v)^n,  P(best = v) = F(v)^n - F(v-)^n

        Responses with the same value share its probability in proportion to the reference, so that
        KL = sum_v P(best = v) log(P(best = v) / P(v))            (Beirami et al. 2024, lemma 1, with ties)

        Raises:
            ValueError: for n below 1.
        """
        if n < 1:
            raise ValueError(f"best of {n}: expected n of at least 1")
        before = np.append(-np.inf, self.log_below[:-1])
        # F(v)^n - F(v-)^n = -F(v)^n expm1(n log(F(v-) / F(v)))
        with np.errstate(divide="ignore", invalid="ignore"):  # a value that cannot be the best contributes 0
            log_best = n * self.log_below + np.log(-np.expm1(n * (before - self.log_below)))
            best = np.exp(log_best)
            terms = np.where(best > 0, best * (log_best - self.log_mass), 0.0)
        return float(best @ self.measured), max(0.0, float(terms.sum()))
