"""Intervals of figures whose values depend on each other in two ways: judgements share prompts and labelers.

The estimand is that of all prompts and labelers like these. Two judgements of one prompt are alike because of the
prompt, two of one labeler because of the labeler; judgements that share neither are independent. The variance of a sum
of influences psi_n with clusters p(n) and l(n) is (Cameron, Gelbach and Miller 2011, eq. 2.13)

    V = V_prompt + V_labeler - V_both,   V_X = X / (X - 1) sum over clusters x of (sum of psi_n in x)^2

with X clusters of that kind, and "both" the clusters of judgements with the same prompt and labeler. V may be too
small, even negative, where one kind hardly matters: the largest of V, V_prompt and V_labeler is taken (MacKinnon,
Nielsen and Webb 2021, section 3). The quantile is Student's with min(P, L) - 1 degrees of freedom. Two labelers allow
little to be said about others. One labeler allows nothing: the interval is then over prompts alone, for this labeler.

Measured by simulation (tests/evaluation/test_two_way.py): 93.5 to 96.5 % with 4 and 8 labelers who differ, 99.5 % and
above where they do not, or where they are two.

Legend: N judgements, P prompts, L labelers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.evaluation.statistics import (
    WILSON,
    Estimate,
    Numbers,
    agreement,
    effective_size,
    prompt_codes,
    prompt_means,
    prompt_weights,
    share_error,
    student_p,
    student_quantile,
    wilson_interval,
)

OVER_BOTH = "t over prompts and labelers"
SHARE_OVER_BOTH = "wilson over prompts and labelers"


@dataclass(frozen=True)
class Judged:
    """The prompt and the labeler of each judgement, as numbers from 0: (N,) each."""

    prompt: np.ndarray
    labeler: np.ndarray

    @classmethod
    def by(cls, prompts: Sequence[Hashable], labelers: Sequence[Hashable] | None = None) -> Judged:
        """Number the prompts and labelers; without labelers all judgements are those of one.

        Raises:
            ValueError: there are no judgements, or not as many prompts as labelers.
        """
        if not len(prompts) or (labelers is not None and len(labelers) != len(prompts)):
            found = f"{len(prompts)} prompts" + ("" if labelers is None else f" and {len(labelers)} labelers")
            raise ValueError(f"found {found}, expected one of each for every judgement, at least one")
        codes = prompt_codes(prompts)
        return cls(codes, np.zeros_like(codes) if labelers is None else prompt_codes(labelers))

    @property
    def prompts(self) -> int:
        return int(self.prompt.max()) + 1

    @property
    def labelers(self) -> int:
        return int(self.labeler.max()) + 1

    @property
    def clusters(self) -> int:
        """One more than the degrees of freedom: min(P, L), or P with one labeler."""
        return self.prompts if self.labelers == 1 else min(self.prompts, self.labelers)

    @property
    def quantile(self) -> float:
        """The 97.5 % quantile of Student's t."""
        return student_quantile(self.clusters - 1)

    @property
    def scale(self) -> float:
        """The square of the ratio of the quantile with P - 1 degrees of freedom to `quantile`; see `effective_size`."""
        return (student_quantile(self.prompts - 1) / self.quantile) ** 2 if math.isfinite(self.quantile) else 1.0

    def variance(self, influence: np.ndarray) -> np.ndarray:
        """The variance of the sum of influences over judgements: (N, ...) -> (...); infinite with one prompt."""
        if self.prompts < 2:
            return np.full(influence.shape[1:], math.inf)
        by_prompt = _clustered(influence, self.prompt)
        if self.labelers < 2:
            return by_prompt
        by_labeler = _clustered(influence, self.labeler)
        both = _clustered(influence, np.unique(self.prompt * self.labelers + self.labeler, return_inverse=True)[1])
        return np.maximum(by_prompt + by_labeler - both, np.maximum(by_prompt, by_labeler))


def _clustered(influence: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """V_X of the head of this module: (N, ...), (N,) -> (...)."""
    count = int(codes.max()) + 1
    sums = np.zeros((count, *influence.shape[1:]))
    np.add.at(sums, codes, influence)
    return (sums**2).sum(0) * (count / (count - 1))


def two_way_share(
    values: Numbers, prompts: Sequence[Hashable], labelers: Sequence[Hashable], *, null: float = 0.5
) -> tuple[Estimate, float | None]:
    """The mean over prompts of a prompt's mean, of values in [0, 1], and the two-sided p-value of "it is `null`".

    The interval is Wilson's with the effective size of the variance above. `clusters` of the estimate counts what the
    degrees of freedom count.

    Args:
        values, prompts, labelers: equally many, one for each judgement.

    Raises:
        ValueError: there are no values, or lists of different length.
    """
    means, judged = prompt_means(values, prompts), Judged.by(prompts, labelers)
    mean = float(means.mean())
    influence = prompt_weights(prompts) * (np.asarray(values, dtype=np.float64) - mean)
    variance = float(judged.variance(influence))
    size = effective_size(mean, variance, judged.prompts, agreement(means), judged.scale)
    low, high = wilson_interval(mean, size, judged.quantile)
    method = WILSON if judged.labelers == 1 else SHARE_OVER_BOTH
    p = student_p(mean - null, share_error(size, null), judged.clusters - 1)
    return Estimate(mean, low, high, len(values), judged.clusters, method), p
