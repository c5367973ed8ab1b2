"""Exact figures of the KL-regularised objective, for prompts whose responses can all be listed.

With a reward R, a reference pi_ref and beta > 0, the objective of a policy is, per prompt,

    J(pi) = sum_y pi(y) [R(y) - beta log(pi(y) / pi_ref(y))]

Its maximiser is pi*(y) = pi_ref(y) exp(R(y) / beta) / Z, its maximum J* = beta log Z, and for every policy

    J* - J(pi) = beta KL(pi || pi*)

(Rafailov et al. 2023, eq. 4 and 12; Ziegler et al. 2019, section 2). Leaves are responses, ended or cut; all sums are
taken in float64. Tensors are (L,), L the leaves of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.data import world
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.evaluation.enumeration import ResponseTree

MASS_TOLERANCE = 1e-5


def require_mass(logprobs: Tensor, label: str) -> float:
    """sum_y pi(y), which must be 1.

    Raises:
        RunFailed: it differs from 1 by more than 1e-5: the log-probabilities are not those of a policy.
    """
    mass = float(logprobs.exp().sum())
    if not abs(mass - 1.0) <= MASS_TOLERANCE:
        raise RunFailed(f"{label}: its probabilities of all responses sum to {mass:.7f}, expected 1 within 1e-5")
    return mass


def expectation(logprobs: Tensor, values: Tensor) -> float:
    """sum_y pi(y) values(y)."""
    return float((logprobs.exp() * values.double()).sum())


def kl_divergence(logprobs: Tensor, other: Tensor) -> float:
    """KL(p || q) = sum_y p(y) [log p(y) - log q(y)] in nats; 0 log 0 = 0."""
    terms = logprobs.exp() * (logprobs - other)
    return float(torch.where(logprobs == -torch.inf, 0.0, terms).sum())


def log_partition(ref_logprobs: Tensor, reward: Tensor, beta: float) -> float:
    """log Z = log sum_y pi_ref(y) exp(R(y) / beta)."""
    return float(torch.logsumexp(ref_logprobs + reward.double() / beta, 0))


def optimum(ref_logprobs: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log pi*(y) = log pi_ref(y) + R(y) / beta - log Z."""
    tilted = ref_logprobs + reward.double() / beta
    return tilted - torch.logsumexp(tilted, 0)


@dataclass(frozen=True)
class PolicyFigures:
    """Figures of one policy on one prompt. kl: to the reference; gap = J* - J = beta KL(pi || pi*);
    attainable = J* - J(pi_ref), the largest possible gain."""

    reward: float
    kl: float
    objective: float
    gap: float
    attainable: float


def policy_figures(logprobs: Tensor, ref_logprobs: Tensor, reward: Tensor, beta: float) -> PolicyFigures:
    """The objective of a policy and its distance from the optimum; the gap is computed as a KL, not as a difference."""
    mean, kl = expectation(logprobs, reward), kl_divergence(logprobs, ref_logprobs)
    best = beta * log_partition(ref_logprobs, reward, beta)
    return PolicyFigures(
        reward=mean,
        kl=kl,
        objective=mean - beta * kl,
        gap=beta * kl_divergence(logprobs, optimum(ref_logprobs, reward, beta)),
        attainable=best - expectation(ref_logprobs, reward),
    )


@dataclass(frozen=True)
class RewardLaw:
    """The distribution of the reward under the reference: its distinct values, and the log of their mass.

    It determines every figure of pi* except its responses; the world's reward has few distinct values.
    """

    values: Tensor
    log_mass: Tensor

    @classmethod
    def of(cls, ref_logprobs: Tensor, reward: Tensor) -> RewardLaw:
        values, place = torch.unique(reward.double(), return_inverse=True)
        mass = torch.zeros_like(values).index_add(0, place, ref_logprobs.exp())
        return cls(values, mass.log())

    def optimum(self, beta: float) -> tuple[float, float, float]:
        """(mean reward, KL to the reference, log Z) of pi* at one beta.

        KL(pi* || pi_ref) = E_{pi*}[R] / beta - log Z.
        """
        tilted = self.log_mass + self.values / beta
        log_z = float(torch.logsumexp(tilted, 0))
        reward = float(((tilted - log_z).exp() * self.values).sum())
        return reward, reward / beta - log_z, log_z


@dataclass(frozen=True)
class GibbsFrontier:
    """The Gibbs frontier over a grid of betas, each used for all prompts: (G,) means over prompts."""

    betas: Tensor
    reward: Tensor
    kl: Tensor
    log_partition: Tensor

    def bound(self, kl: float) -> float:
        """The largest reward of any policy at a mean KL: min over beta of [beta KL + beta mean log Z].

        By weak duality every beta gives an upper bound, so a grid gives an upper bound too; a line through the
        frontier's points would be below the curve.
        """
        return float((self.betas * (kl + self.log_partition)).min())


def frontier(laws: Sequence[RewardLaw], betas: Sequence[float]) -> GibbsFrontier:
    """Mean reward against mean KL of pi* over prompts, for each beta."""
    rows = torch.tensor([[law.optimum(beta) for law in laws] for beta in betas], dtype=torch.float64)
    reward, kl, log_z = rows.mean(1).unbind(1)
    return GibbsFrontier(torch.tensor(list(betas), dtype=torch.float64), reward, kl, log_z)


def beta_grid() -> list[float]:
    """A dense grid of betas from 0.02 to 50, evenly spaced in their logarithm."""
    start, end = torch.tensor([0.02, 50.0]).log10().tolist()
    return torch.logspace(start, end, 256, dtype=torch.float64).tolist()


def world_reward(prompt_ids: Sequence[int], tree: ResponseTree) -> Tensor:
    """The world's true reward of every leaf: (L,) float64."""
    genre, aspect = world.parse_prompt(list(prompt_ids))
    genres, aspects = np.full(tree.num_leaves, genre), np.full(tree.num_leaves, aspect)
    found = world.true_reward(genres, aspects, tree.responses, tree.word_counts, tree.ended)
    return torch.from_numpy(found.reward)
