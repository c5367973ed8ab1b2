"""f-divergences: what takes the place of the log-ratio in the implicit reward."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST = 80.0
"""The largest exponent: beyond it the result is constant, because e^88 is not finite in fp32."""


def divergence_scores(log_ratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) of t = pi / pi_ref, up to a constant; beta f'(t) is the implicit reward under sum pi_ref f(pi / pi_ref).

        reverse_kl: log t    forward_kl: 1 - 1 / t    js: log(2 t / (1 + t))    alpha: (t^(a - 1) - 1) / (a - 1)

    The policy that maximises E R - beta sum pi_ref f(pi / pi_ref) is pi_ref (f')^-1((R + c) / beta), with the c that
    makes it a distribution. alpha with a = 1 is reverse_kl, with a = 0 forward_kl. Source: Wang et al. 2024 (f-DPO);
    alpha as in TRL.

    Args:
        log_ratios: log t of whole responses, in nats. alpha: a.
    """
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "js":
        return math.log(2.0) + logsigmoid(log_ratios)
    power = -1.0 if divergence == "forward_kl" else alpha - 1.0
    return log_ratios if power == 0.0 else torch.expm1((power * log_ratios).clamp(max=LARGEST)) / power
