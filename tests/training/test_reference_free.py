"""Where the losses without a reference come to rest over a whole population of pairs, and what a step makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.algorithms.reference_free import log_odds
from rlhf_pipeline.training.pairs import Criterion, first_completions, preference_loss

BETA, COUNT = 0.5, 6
DRAW = torch.Generator().manual_seed(3)
LOG_MU = torch.log_softmax(torch.randn(COUNT, generator=DRAW, dtype=torch.float64), -1)
REWARD = torch.randn(COUNT, generator=DRAW, dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 3, 4, 2, 3])
PREFERENCE = torch.sigmoid(REWARD[:, None] - REWARD)


def population_loss(criterion: Criterion, logprobs: Tensor, *, lengths: Tensor = LENGTHS, soft: bool = True) -> Tensor:
    """Mean loss over pairs drawn i.i.d. from mu: with their probabilities as targets, or with drawn labels."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(logprobs)):
        for j in range(len(logprobs)):
            read, size = torch.stack([logprobs[i], logprobs[j]]), torch.stack([lengths[i], lengths[j]])
            target = PREFERENCE[i, j][None] if soft else None
            loss = preference_loss(criterion, read, None, size, None, target=target).loss
            total = total + (LOG_MU[i] + LOG_MU[j]).exp() * (1.0 if soft else 2 * PREFERENCE[i, j]) * loss
    return total


def slope(criterion: Criterion, log_pi: Tensor, **options) -> float:
    """Largest entry of the gradient in the logits of a policy over the responses."""
    logits = log_pi.clone().requires_grad_()
    loss = population_loss(criterion, torch.log_softmax(logits, -1), **options)
    return torch.autograd.grad(loss, logits)[0].abs().max().item()


def normalised(family) -> Tensor:
    """The member of a family of log-probabilities, growing in c, whose probabilities sum to 1."""
    from scipy.optimize import brentq

    low, high = -60.0, 0.0
    while torch.logsumexp(family(high), 0) < 0:
        high += 1.0
    return family(brentq(lambda c: torch.logsumexp(family(c), 0).item(), low, high, xtol=1e-15, rtol=1e-15))


@pytest.mark.parametrize("soft", [False, True])
def test_cpo_without_its_sft_term_has_a_uniform_reference(soft):
    cpo = Criterion(BETA, (("cpo", 1.0),))
    assert slope(cpo, torch.log_softmax(REWARD / BETA, 0), soft=soft) < 1e-15
    assert slope(cpo, torch.zeros(COUNT, dtype=torch.float64), soft=soft) > 1e-2


@pytest.mark.parametrize("soft", [False, True])
def test_simpo_without_a_margin_weighs_the_reward_by_length(soft):
    """pi = exp(L (R / beta + c)), c such that the sum is 1."""
    simpo = Criterion(BETA, (("simpo", 1.0),))
    best = normalised(lambda c: LENGTHS * (REWARD / BETA + c))
    assert slope(simpo, best, soft=soft) < 1e-14
    assert slope(simpo, torch.log_softmax(REWARD / BETA, 0), soft=soft) > 1e-3
    assert slope(Criterion(BETA, (("simpo", 1.0),), gamma=0.5), best, soft=soft) > 1e-3


def test_simpo_with_a_margin_is_the_convex_fit_of_shifted_scores():
    """s minimises -sum w_ij p_ij log sigma(s_i - s_j - gamma), pi = exp(L (s / beta + c))."""
    from scipy.optimize import root

    gamma, mu, p = 1.0, LOG_MU.exp().numpy(), PREFERENCE.numpy()

    def field(s):
        off = 2 * mu[:, None] * mu * p / (1 + np.exp(s[:, None] - s - gamma))
        return off.sum(1) - off.sum(0)

    found = root(lambda rest: field(np.append(0.0, rest))[1:], np.zeros(COUNT - 1), tol=1e-14)
    scores = torch.from_numpy(np.append(0.0, found.x))
    best = normalised(lambda c: LENGTHS * (scores / BETA + c))
    for soft in (False, True):
        assert slope(Criterion(BETA, (("simpo", 1.0),), gamma=gamma), best, soft=soft) < 1e-12
    assert slope(Criterion(BETA, (("simpo", 1.0),)), best) > 1e-3


@pytest.mark.parametrize("q", [0.6, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_margin_of_simpo_over_two_responses(q, gamma):
    """e^m = [(2 q - 1) g + sqrt((2 q - 1)^2 g^2 + 4 q (1 - q))] / (2 (1 - q)), g = e^gamma."""
    g = math.exp(gamma)
    root = math.sqrt((2 * q - 1) ** 2 * g**2 + 4 * q * (1 - q))
    m = math.log(((2 * q - 1) * g + root) / (2 * (1 - q)))
    means = torch.tensor([-1.0 + m / BETA, -1.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([q], dtype=torch.float64)
    criterion, ones = Criterion(BETA, (("simpo", 1.0),), gamma=gamma), torch.tensor([1, 1])
    loss = preference_loss(criterion, means, None, ones, None, target=target).loss
    assert torch.autograd.grad(loss, means)[0].abs().max().item() < 1e-15


@pytest.mark.parametrize("soft", [False, True])
def test_the_odds_term_of_orpo_alone_fits_the_log_odds_of_tokens_to_the_reward(soft):
    """pi = sigma(R + c)^L, c such that the sum is 1, whatever lambda."""
    best = normalised(lambda c: LENGTHS * torch.nn.functional.logsigmoid(REWARD + c))
    for beta in (0.1, 2.0):
        assert slope(Criterion(beta, (("orpo", 1.0),)), best, soft=soft) < 1e-14
        assert slope(Criterion(beta, (("orpo", 1.0),)), torch.log_softmax(REWARD / beta, 0), soft=soft) > 1e-3


@pytest.mark.parametrize("q", [0.6, 0.9])
@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_orpo_over_two_responses_of_one_token(q, lam):
    """p - q + 2 lambda (sigma(2 logit p) - q) = 0, of the odds term and the SFT loss on the chosen response."""
    from scipy.optimize import brentq

    def field(p):
        odds = p / (1 - p)
        return p - q + 2 * lam * (odds**2 / (1 + odds**2) - q)

    p = brentq(field, 1e-9, 1 - 1e-9, xtol=1e-15)
    assert abs(p - q) > 1e-3  # SFT alone: q
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    logprobs = torch.nn.functional.logsigmoid(torch.stack([logit, -logit]))
    target, ones = torch.tensor([q], dtype=torch.float64), torch.tensor([1, 1])
    odds = preference_loss(Criterion(lam, (("orpo", 1.0),)), logprobs, None, ones, None, target=target).loss
    sft = -(q * logprobs[0] + (1 - q) * logprobs[1])
    assert abs(torch.autograd.grad(odds + sft, logit)[0].item()) < 1e-12


def test_the_losses_by_hand():
    logprobs = torch.tensor([-1.0, -3.0, -2.0, -1.0], dtype=torch.float64)  # two pairs: chosen, rejected
    lengths = torch.tensor([2, 3, 1, 4])
    means = [-0.5, -1.0, -2.0, -0.25]

    def loss(name, **options):
        return preference_loss(Criterion(0.5, ((name, 1.0),), **options), logprobs, None, lengths, None)

    def softplus(x):
        return math.log1p(math.exp(x))

    assert loss("cpo").loss.item() == pytest.approx(softplus(-1.0) + softplus(0.5), abs=1e-14)
    assert loss("simpo", gamma=0.3).loss.item() == pytest.approx(softplus(0.05) + softplus(1.175), abs=1e-14)
    odds = [m - math.log(1 - math.exp(m)) for m in means]
    expected = 0.5 * (softplus(odds[1] - odds[0]) + softplus(odds[3] - odds[2]))
    assert loss("orpo").loss.item() == pytest.approx(expected, abs=1e-14)
    rewards = {
        "cpo": ([-0.5, -1.0], [-1.5, -0.5]),
        "simpo": ([-0.25, -1.0], [-0.5, -0.125]),
        "orpo": ([odds[0], odds[2]], [odds[1], odds[3]]),
    }
    for name, (chosen, rejected) in rewards.items():
        found = loss(name)
        assert found.chosen_rewards.tolist() == pytest.approx(chosen, abs=1e-14)
        assert found.rejected_rewards.tolist() == pytest.approx(rejected, abs=1e-14)


def test_the_odds_of_a_certain_response_are_finite():
    for dtype in (torch.float32, torch.float64):
        certain = torch.zeros(1, dtype=dtype, requires_grad=True)
        odds = log_odds(certain)
        assert torch.isfinite(odds).all() and odds.item() > 15
        assert torch.isfinite(torch.autograd.grad(odds.sum(), certain)[0]).all()
        assert log_odds(torch.tensor([-200.0], dtype=dtype)).item() == -200.0


def test_a_list_of_losses_is_their_weighted_sum():
    draw = torch.Generator().manual_seed(1)
    logprobs, ref = (-3 * torch.rand(8, generator=draw, dtype=torch.float64) for _ in range(2))
    lengths, target = torch.tensor([1, 2, 3, 4, 2, 3, 4, 1]), torch.rand(4, generator=draw, dtype=torch.float64)
    parts = (("sigmoid", 0.8), ("ipo_mean", 0.1), ("simpo", 2.0), ("plackett_luce", 0.5))

    def loss(losses):
        inputs = [logprobs.clone().requires_grad_(), ref, lengths, None]
        found = preference_loss(Criterion(BETA, losses, 0.1, 0.3), *inputs, target=target)
        return found, torch.autograd.grad(found.loss, inputs[0])[0]

    together, slope_together = loss(parts)
    each = [loss(((name, 1.0),)) for name, _ in parts]
    expected = sum(weight * found.loss for (found, _), (_, weight) in zip(each, parts, strict=True))
    slopes = sum(weight * gradient for (_, gradient), (_, weight) in zip(each, parts, strict=True))
    assert together.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(slope_together, slopes, rtol=0, atol=1e-12)
    assert together.chosen_rewards.tolist() == pytest.approx((BETA * (logprobs - ref))[::2].tolist(), abs=1e-15)


def test_the_first_completion_of_a_pair_is_the_chosen_one():
    assert first_completions(4).tolist() == [True, False, True, False]
