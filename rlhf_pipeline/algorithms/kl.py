"""Estimators of KL(pi || pi_ref) from log-probabilities of sampled tokens.

Source: J. Schulman, "Approximating KL divergence" (2020). For samples of pi with log-ratio d = log pi - log pi_ref,
k1 = d and k3 = exp(-d) - 1 + d are unbiased estimators of the KL; k2 = d^2 / 2 is biased. Only k1 may be used in the
reward: with k2 or k3 in the reward, the policy gradient is not that of the KL. All are elementwise, in nats.
"""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref, elementwise; unbiased, may be negative."""
    assert logprobs.shape == ref_logprobs.shape
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2, elementwise; biased (used for the approximate KL between updates)."""
    assert logprobs.shape == ref_logprobs.shape
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi), elementwise; unbiased and never negative."""
    assert logprobs.shape == ref_logprobs.shape
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The penalty of the next rollout: beta (1 + clip(KL / target - 1, -.2, .2) episodes / horizon).

    Source: Ziegler et al. 2019, section 2.2.

    Args:
        kl: mean KL to the reference over the responses of this rollout, in nats. target: > 0.
        episodes: responses of a rollout, at most `horizon`.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
