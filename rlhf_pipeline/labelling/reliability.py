"""Labeler-adjusted Bradley-Terry: how reliable each labeler is, and the strengths of responses that follow.

Labeler j prefers response i to response k of one item with the probability

    P(i beats k by j) = sigma(a_j (s_i - s_k)),    mean over j of log a_j = 0

(Raman and Joachims 2014, "Methods for Ordinal Peer Grading", Bradley-Terry with the reliability of graders). The
strengths s of a response rest on a few labels, so that fitting them beside a_j would take each labeler's own labels as
evidence for the labeler. They are integrated out: s_i - s_k is normal around 0, and each pair of responses has the
likelihood

    L = integral of prod_j sigma(a_j z)^won_j sigma(-a_j z)^(1 - won_j) phi(z) dz,    won_j in {0, 1/2, 1}

over the labelers j of that pair. A tie is half a win for each. The product over the pairs of an item is a composite
likelihood (Varin, Reid and Firth 2011): its maximum is consistent, and its intervals are by item (sandwich). They
cover 93 to 97 % in simulations, and 90 % for the best of three labelers of whom one nearly guesses.

Only what labelers say of the same pair counts, so this needs three labelers who meet one another: from the agreement of
two labelers alone nobody can tell which of the two is right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf_pipeline.evaluation.statistics import Estimate, prompt_codes, student_quantile
from rlhf_pipeline.labelling.pairs import Pair

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(60)
GRID = np.concatenate([-4 * (_NODES[::-1] + 1), 4 * (_NODES + 1)])
"""Values of z for the integral, -8 ... 8: Gauss-Legendre on either side of 0, where steep curves bend."""

DENSITY = np.concatenate([_WEIGHTS[::-1], _WEIGHTS]) * np.exp(-(GRID**2) / 2)
DENSITY /= DENSITY.sum()

DOUBT = 0.5
"""Right and wrong labels that each labeler is given beside the real ones, so that full agreement has a finite a."""


@dataclass(frozen=True)
class Fit:
    """The reliabilities of J labelers.

    labelers: their numbers, (J,). raw: a_j in units in which s_i - s_k has the standard deviation 1, (J,); negative
    where the labeler is more often wrong than right. covariance: of raw, (J, J). clusters: items.
    """

    labelers: list[int]
    raw: np.ndarray
    covariance: np.ndarray
    pairs: int
    clusters: int

    def right(self, labeler: int) -> Estimate:
        """The probability that a label of this labeler names the better response: E sigma(a |z|), one half for a coin.

        The interval is symmetric in asinh a, which is like a near 0 and like its log far from it: Student's t with the
        delta method.
        """
        place = self.labelers.index(labeler)
        a = float(self.raw[place])
        half = self._quantile * math.sqrt(self.covariance[place, place] / (1 + a**2))
        low, high = np.sinh(np.clip([math.asinh(a) - half, math.asinh(a) + half], -700.0, 700.0))
        return Estimate(right_share(a), right_share(low), right_share(high), self.pairs, self.clusters, "t")

    def reliability(self, labeler: int) -> Estimate | None:
        """a_j over the geometric mean of all a that are surely above 0, so that the mean of their logs is 0.

        The interval is symmetric in log a: Student's t with the delta method. None where a_j is not above 0 (no log),
        or where no labeler is surely right more often than a coin.
        """
        place = self.labelers.index(labeler)
        sure = np.array([self.right(one).low > 0.5 for one in self.labelers])
        if self.raw[place] <= 0 or not sure.any():
            return None
        shares = np.eye(len(sure))[place] - sure / sure.sum()
        used = shares != 0
        logs, slope = np.log(self.raw[used]), shares[used] / self.raw[used]
        value = float(shares[used] @ logs)
        half = self._quantile * math.sqrt(max(float(slope @ self.covariance[np.ix_(used, used)] @ slope), 0.0))
        low, high = math.exp(value - half), math.exp(min(value + half, 700.0))
        return Estimate(math.exp(value), low, high, self.pairs, self.clusters, "t")

    @property
    def _quantile(self) -> float:
        return student_quantile(self.clusters - 1)


def right_share(a: float) -> float:
    """E sigma(a |z|) of a standard normal z: the probability that the better response is preferred."""
    return float(_sigma(a * np.abs(GRID)) @ DENSITY)


def right_slope(a: float) -> float:
    """The derivative of `right_share`: E |z| sigma(a z) sigma(-a z)."""
    return float((np.abs(GRID) * _sigma(a * GRID) * _sigma(-a * GRID)) @ DENSITY)


def _sigma(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def identified(met: Iterable[tuple[int, int]]) -> set[int]:
    """The labelers whose reliability can be told, from who met whom.

    The agreement of j and l says how large a_j a_l is, nothing of each alone. Products along the edges of a connected
    graph give each factor if and only if the graph has a circle of odd length: three labelers who met one another.
    """
    neighbours: dict[int, set[int]] = defaultdict(set)
    for one, other in met:
        neighbours[one].add(other)
        neighbours[other].add(one)
    found: set[int] = set()
    side: dict[int, int] = {}
    for start in sorted(neighbours):
        if start in side:
            continue
        side[start], part, odd = 0, [start], False
        for one in part:  # grows while it is read
            for other in neighbours[one]:
                if other not in side:
                    side[other] = 1 - side[one]
                    part.append(other)
                odd = odd or side[other] == side[one]
        found |= set(part) if odd else set()
    return found


def fit(pairs: Iterable[Pair]) -> Fit | None:
    """Reliabilities from all comparisons (with ties) at first sight; None where nobody's can be told.

    Labelers who meet no two others that also meet (see `identified`) are left out.
    """
    said: dict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
    for pair in pairs:
        if pair.judgement.repeat == 0:
            said[pair.key][pair.judgement.labeler] = pair.won
    known = identified(two for one in said.values() for two in combinations(sorted(one), 2))
    rows = [(key[0], {j: won for j, won in one.items() if j in known}) for key, one in sorted(said.items())]
    rows = [(item, one) for item, one in rows if len(one) > 1]
    if not rows:
        return None
    labelers = sorted({j for _, one in rows for j in one})
    wins = np.zeros((len(rows), len(labelers), 2))  # of the first and of the second response
    for n, (_, one) in enumerate(rows):
        for j, won in one.items():
            wins[n, labelers.index(j)] = won, 1 - won
    # Responses have no order, so pairs with exchanged labels are alike; few different ones are left.
    wins = np.array([max(row.tolist(), row[:, ::-1].tolist()) for row in wins])
    kinds, kind, counts = np.unique(wins, axis=0, return_inverse=True, return_counts=True)
    kind, items = kind.ravel(), prompt_codes([item for item, _ in rows])
    raw = maximise(kinds, counts)
    by_item = np.zeros((int(items.max()) + 1, len(labelers)))
    np.add.at(by_item, items, log_likelihoods(raw, kinds)[1][kind])
    return Fit(labelers, raw, _sandwich(raw, kinds, counts, by_item), len(rows), len(by_item))


def _sandwich(raw: np.ndarray, wins: np.ndarray, counts: np.ndarray, by_item: np.ndarray) -> np.ndarray:
    """P / (P - 1) H^-1 (sum_p g_p g_p') H^-1, H from differences of the gradient; infinite for one item."""
    size, groups, step = len(raw), len(by_item), 1e-4
    if groups < 2:
        return np.full((size, size), math.inf)
    moves = step * np.eye(size)
    bread = [objective(raw - move, wins, counts)[1] - objective(raw + move, wins, counts)[1] for move in moves]
    inverse = np.linalg.pinv(np.array(bread) / (2 * step))
    return inverse @ (by_item.T @ by_item) @ inverse.T * groups / (groups - 1)


def maximise(wins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The a (J,) that maximise `objective`.

    The likelihood is the same for a and -a; the maximum is the one at which labelers are right on average.
    """
    from scipy.optimize import minimize

    def loss(a: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = objective(a, wins, counts)
        return -value / counts.sum(), -slope / counts.sum()

    found = minimize(loss, np.ones(wins.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 500}).x
    return -found if found.sum() < 0 else found


def objective(a: np.ndarray, wins: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
    """sum_r n_r log L_r + DOUBT sum_j (log p_j + log(1 - p_j)), p_j = E sigma(a_j |z|), and its derivative by a (J,).

    Args:
        wins: (R, J, 2): 1, 1/2 or 0 wins of either response of pair r by labeler j; both 0 where j did not compare it.
        counts: n_r, (R,).
    """
    likelihood, scores = log_likelihoods(a, wins)
    p, slope = np.array([right_share(one) for one in a]), np.array([right_slope(one) for one in a])
    value = float(counts @ likelihood + DOUBT * np.log(p * (1 - p)).sum())
    return value, counts @ scores + DOUBT * slope * (1 / p - 1 / (1 - p))


def log_likelihoods(a: np.ndarray, wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L of each pair (R,), and its derivative by a (R, J): E[z (won_j - played_j sigma(a_j z))] given the labels.

    Args:
        a: (J,). wins: see `objective`; won_j is that of the first response, played_j the sum of both.
    """
    won, lost = wins[:, :, 0], wins[:, :, 1]
    up = -np.logaddexp(0.0, -np.outer(a, GRID))
    weighted = np.exp(won @ up + lost @ (up - np.outer(a, GRID))) * DENSITY
    total = weighted.sum(1)
    given = weighted / total[:, None]
    return np.log(total), won * (given @ GRID)[:, None] - (won + lost) * (given @ (np.exp(up) * GRID).T)


def strengths(pairs: Sequence[Pair], sizes: Mapping[int, int], raw: Mapping[int, float]) -> dict[int, list[float]]:
    """The strengths of each item's responses that maximise sum log sigma(a_j (s_i - s_k)) - sum s^2.

    The last term is the normal law of s with variance 1/2, of which differences have variance 1. Ties are half a win.

    Args:
        sizes: K of each item. raw: a_j of each labeler; labelers without one have the mean of the others.

    Returns:
        {item: (K,)}, sum 0, of the items that have pairs.
    """
    wins: dict[int, list[tuple[int, int, float, float]]] = defaultdict(list)
    middle = float(np.mean(list(raw.values()))) if raw else 1.0
    for pair in pairs:
        if pair.judgement.repeat == 0:
            i, k = pair.key[1:]
            wins[pair.item].append((i, k, raw.get(pair.judgement.labeler, middle), pair.won))
    return {item: _map_strengths(sizes[item], rows).tolist() for item, rows in wins.items()}


def _map_strengths(size: int, rows: Sequence[tuple[int, int, float, float]]) -> np.ndarray:
    """Newton's method; the objective is strictly concave."""
    first, second = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    a, won = np.array([row[2] for row in rows]), np.array([row[3] for row in rows])
    direction = a[:, None] * (np.eye(size)[first] - np.eye(size)[second])
    s = np.zeros(size)
    for _ in range(100):
        p = _sigma(direction @ s)
        slope = direction.T @ (won - p) - 2 * s
        if np.abs(slope).max() < 1e-10:
            break
        curvature = (direction * (p * (1 - p))[:, None]).T @ direction + 2 * np.eye(size)
        s += np.clip(np.linalg.solve(curvature, slope), -1.0, 1.0)
    return s
