"""KTO: values and slopes by hand, APO-zero where z0 is 0, and the closed form where z0 is the KL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.algorithms.kto import kto_loss, reference_point
from rlhf_pipeline.algorithms.preference import apo_zero_loss

BETA = 0.5
DRAW = torch.Generator().manual_seed(0)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_values_and_slopes_by_hand():
    """At beta 1 and d = log 3: sigma(d) = 3/4 and its slope 3/16; with z0 = log 3 both are 1/2 and 1/4."""
    for z0, good, bad, slope in ((0.0, 1 / 4, 3 / 4, 3 / 16), (math.log(3), 1 / 2, 1 / 2, 1 / 4)):
        logprobs = numbers(-1 + math.log(3), -2 + math.log(3)).requires_grad_()
        weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
        found = kto_loss(logprobs, numbers(-1, -2), numbers(1, 0), z0, beta=1.0, **weights)
        assert found.loss.item() == pytest.approx(2 * good + 0.5 * bad, abs=1e-15)
        (gradient,) = torch.autograd.grad(found.loss, logprobs)
        torch.testing.assert_close(gradient, numbers(-2 * slope, 0.5 * slope), rtol=0, atol=1e-15)
        torch.testing.assert_close(found.rewards, numbers(math.log(3), math.log(3)), rtol=0, atol=1e-15)


def test_beta_scales_the_distance_from_the_reference_point():
    """At beta 1/2, d = 2 log 3 + 1 and z0 = 1: beta (d - z0) = log 3."""
    found = kto_loss(numbers(2 * math.log(3)), numbers(-1), numbers(1), 1.0, beta=BETA)
    assert found.loss.item() == pytest.approx(1 / 4, abs=1e-15)
    assert found.rewards.item() == pytest.approx(math.log(3) + 0.5, abs=1e-15)


@pytest.mark.parametrize(("total", "count", "z0"), [(3.0, 2, 1.5), (-1.0, 2, 0.0), (0.0, 0, 0.0)])
def test_the_reference_point_is_a_mean_that_is_not_negative(total, count, z0):
    assert reference_point(total, count) == z0


def test_pairs_as_two_responses_have_the_loss_and_the_gradient_of_apo_zero_if_z0_is_0():
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 9, generator=DRAW, dtype=torch.float64)
    sides = [chosen.requires_grad_(), rejected.requires_grad_()]
    pairs = apo_zero_loss(*sides, ref_chosen, ref_rejected, beta=BETA)
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat_interleave(9)
    single = kto_loss(torch.cat(sides), torch.cat([ref_chosen, ref_rejected]), labels, beta=BETA)
    torch.testing.assert_close(single.loss, pairs.loss, rtol=0, atol=1e-14)
    for one, other in zip(*(torch.autograd.grad(loss.loss, sides) for loss in (single, pairs)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


def test_on_data_of_the_reference_z0_is_0_for_every_policy():
    """The mean of log pi / pi_ref under pi_ref is -KL(pi_ref || pi) <= 0, so KTO with the data's z0 is APO-zero."""
    ref = torch.log_softmax(torch.randn(31, generator=DRAW, dtype=torch.float64), -1)
    for scale in (0.01, 1.0, 5.0):
        policy = torch.log_softmax(ref + scale * torch.randn(31, generator=DRAW, dtype=torch.float64), -1)
        mean = float((ref.exp() * (policy - ref)).sum())
        assert mean < 0 and reference_point(31 * mean, 31) == 0


# Three responses, pairs drawn i.i.d. from mu, labelled by Bradley-Terry: the first two win more often than they lose.
LOG_REF, MU = numbers(0.5, 0.2, 0.3).log(), numbers(0.3, 0.5, 0.2)
REWARD = numbers(1.0, 0.5, -2.0)
WINS = torch.sigmoid(REWARD[:, None] - REWARD) * MU[:, None] * MU
GOOD, BAD = WINS.sum(1), WINS.sum(0)  # how often each is a desirable and an undesirable response


def population_slope(log_pi: Tensor, z0: float, desirable_weight: float) -> Tensor:
    """Gradient in the logits of the expected loss; z0 is a constant."""
    logits = log_pi.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, -1)
    total = torch.zeros((), dtype=torch.float64)
    for share, labels in ((GOOD, torch.ones_like(GOOD)), (BAD, torch.zeros_like(BAD))):
        for y in range(3):
            one = (logprobs[y : y + 1], LOG_REF[y : y + 1], labels[y : y + 1])
            total = total + share[y] * kto_loss(*one, z0, beta=BETA, desirable_weight=desirable_weight).loss
    return torch.autograd.grad(total, logits)[0]


def rest(desirable_weight: float, by_definition: bool) -> tuple[Tensor, float]:
    """The policy of the closed form g_y beta sigma'(beta (d_y - z0)) = lambda pi_y over the two winners, and its z0.

    g = w_D (how often desirable) - (how often undesirable); the loser has a probability of e^-80.
    """
    g = desirable_weight * GOOD - BAD
    assert g[0] > 0 and g[1] > 0 and g[2] < 0

    def at(first: float) -> tuple[Tensor, float, float]:
        log_pi = numbers(math.log(first), math.log1p(-first), -80.0)
        z0 = float((log_pi.exp() * (log_pi - LOG_REF)).sum()) if by_definition else 0.0
        slope = torch.sigmoid(BETA * (log_pi - LOG_REF - z0))
        pull = g * BETA * slope * (1 - slope) / log_pi.exp()
        return log_pi, z0, float(pull[0] - pull[1])

    low, high = 1e-9, 1 - 1e-9
    assert at(low)[2] > 0 > at(high)[2]
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[2] > 0 else (low, middle)
    return at(low)[:2]


@pytest.mark.parametrize("desirable_weight", [1.0, 1.2])
@pytest.mark.parametrize("by_definition", [False, True])
def test_losers_die_and_winners_rest_at_the_closed_form(desirable_weight, by_definition):
    """With z0 = KL(pi || pi_ref), its definition, and with z0 = 0, which is APO-zero; neither is DPO's optimum."""
    log_pi, z0 = rest(desirable_weight, by_definition)
    assert (z0 > 0.1) == by_definition
    assert population_slope(log_pi, z0, desirable_weight).abs().max() < 1e-12
    dpo = LOG_REF + REWARD / BETA
    others = [
        rest(2.2 - desirable_weight, by_definition)[0],
        rest(desirable_weight, not by_definition)[0],
        dpo,
        LOG_REF,
    ]
    for other in others:
        assert population_slope(other, z0, desirable_weight).abs().max() > 1e-5
