"""Preference losses without a reference: (P,) losses of pairs with certain labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def cpo_losses(chosen_logprobs: Tensor, rejected_logprobs: Tensor, *, beta: float) -> Tensor:
    """CPO: -log sigma(beta [log pi(y_w) - log pi(y_l)]), DPO's loss with a uniform reference.

    Its minimiser is exp(R / beta) / Z. CPO adds an SFT loss on the chosen responses. Source: Xu et al. 2024
    (Contrastive Preference Optimization), eq. 3.

    Args:
        *_logprobs: (P,) log-probabilities of whole responses, summed over their tokens, in nats, in at least fp32.
        beta: > 0, scale of the log-probabilities.
    """
    assert chosen_logprobs.ndim == 1 and chosen_logprobs.shape == rejected_logprobs.shape
    return -logsigmoid(beta * (chosen_logprobs - rejected_logprobs))


def simpo_losses(chosen_means: Tensor, rejected_means: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimPO: -log sigma(beta [log pi(y_w) / |y_w| - log pi(y_l) / |y_l|] - gamma).

    Without gamma its minimiser is exp(|y| (R / beta + c)), with the c that makes it a distribution: beta is no price of
    KL to anything. Source: Meng et al. 2024 (SimPO), eq. 6.

    Args:
        *_means: (P,) log-probabilities of responses, as means over their tokens, in nats, in at least fp32.
        beta: > 0, scale of the means. gamma: >= 0, the margin that is asked for.
    """
    assert chosen_means.ndim == 1 and chosen_means.shape == rejected_means.shape
    return -logsigmoid(beta * (chosen_means - rejected_means) - gamma)


def log_odds(means: Tensor) -> Tensor:
    """log(p / (1 - p)) of the geometric mean p = e^m of the probabilities of a response's tokens.

    p is at most 1 - eps, the largest below 1 in this number type, so that the odds are finite.
    """
    means = means.clamp(max=-torch.finfo(means.dtype).eps)
    return means - torch.log(-torch.expm1(means))


def orpo_losses(chosen_means: Tensor, rejected_means: Tensor, *, beta: float) -> Tensor:
    """The odds term of ORPO: -lambda log sigma(log odds(y_w) - log odds(y_l)), lambda = beta.

    odds(y) = p / (1 - p), p = pi(y)^(1 / |y|). Alone its minimiser is sigma(R + c)^|y|, with the c that makes it a
    distribution. ORPO adds an SFT loss on the chosen responses. Source: Hong et al. 2024 (ORPO), eq. 4, 6 and 7.

    Args:
        *_means: (P,) log-probabilities of responses, as means over their tokens, in nats, in at least fp32.
        beta: > 0, lambda, the weight of this term beside the SFT loss.
    """
    assert chosen_means.ndim == 1 and chosen_means.shape == rejected_means.shape
    return -beta * logsigmoid(log_odds(chosen_means) - log_odds(rejected_means))
