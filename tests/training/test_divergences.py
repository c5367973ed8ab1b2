"""DPO against other divergences: minimisers in closed form over a whole population of pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.algorithms.divergences import divergence_scores
from rlhf_pipeline.training.pairs import Criterion, preference_loss

BETA, COUNT = 0.5, 6
DRAW = torch.Generator().manual_seed(5)
LOG_REF, LOG_MU = (torch.log_softmax(torch.randn(COUNT, generator=DRAW, dtype=torch.float64), -1) for _ in range(2))
REWARD = 0.7 * torch.randn(COUNT, generator=DRAW, dtype=torch.float64)
PREFERENCE = torch.sigmoid(REWARD[:, None] - REWARD)
LENGTHS = torch.tensor([1, 2, 3, 4, 2, 3])
# Divergence, alpha, the log of (f')^-1(s), and the s below which it exists.
FAMILIES = [
    ("reverse_kl", 0.5, lambda s: s, math.inf),
    ("forward_kl", 0.5, lambda s: -torch.log(1 - s), 1.0),
    ("js", 0.5, lambda s: s - math.log(2) - torch.log(1 - s.exp() / 2), math.log(2)),
    ("alpha", 0.5, lambda s: -2 * torch.log(1 - s / 2), 2.0),
    ("alpha", 0.2, lambda s: -torch.log(1 - 0.8 * s) / 0.8, 1.25),
    ("alpha", 1.0, lambda s: s, math.inf),
    ("alpha", 0.0, lambda s: -torch.log(1 - s), 1.0),
]
IDS = [f"{name}-{alpha:g}" for name, alpha, *_ in FAMILIES]


def slope(criterion: Criterion, log_pi: Tensor) -> float:
    """Largest entry of the gradient in the logits of a policy, of the mean loss over pairs drawn i.i.d. from mu."""
    logits = log_pi.clone().requires_grad_()
    logprobs, total = torch.log_softmax(logits, -1), torch.zeros((), dtype=torch.float64)
    for i in range(COUNT):
        for j in range(COUNT):
            read, ref = (torch.stack([x[i], x[j]]) for x in (logprobs, LOG_REF))
            lengths = torch.stack([LENGTHS[i], LENGTHS[j]])
            loss = preference_loss(criterion, read, ref, lengths, None, target=PREFERENCE[i, j][None]).loss
            total = total + (LOG_MU[i] + LOG_MU[j]).exp() * loss
    return torch.autograd.grad(total, logits)[0].abs().max().item()


def solved(inverse, limit: float, scale: Tensor | float, aim: Tensor) -> Tensor:
    """log pi = log pi_ref + log (f')^-1(scale (aim + c)), with the c that makes it a distribution."""
    from scipy.optimize import brentq

    def log_pi(c: float) -> Tensor:
        return LOG_REF + inverse(scale * (aim + c))

    high = 30.0 if math.isinf(limit) else float((limit / (scale * torch.ones_like(LOG_REF)) - aim).min()) - 1e-9
    return log_pi(brentq(lambda c: torch.logsumexp(log_pi(c), 0).item(), -200.0, high, xtol=1e-15, rtol=1e-15))


@pytest.mark.parametrize(("name", "alpha", "inverse", "limit"), FAMILIES, ids=IDS)
def test_dpo_rests_at_the_optimum_of_its_divergence(name, alpha, inverse, limit):
    """pi = pi_ref (f')^-1((R + c) / beta)."""
    best = solved(inverse, limit, 1.0, REWARD / BETA)
    criterion = Criterion(BETA, divergence=name, alpha=alpha)
    assert slope(criterion, best) < 1e-12
    of_dpo = LOG_REF + REWARD / BETA
    if alpha != 1.0 and name != "reverse_kl":
        assert slope(criterion, of_dpo) > 1e-3
    else:
        assert slope(criterion, of_dpo) < 1e-15


@pytest.mark.parametrize(("name", "alpha", "inverse", "limit"), FAMILIES[1:4], ids=IDS[1:4])
def test_ipo_and_the_mean_over_tokens_with_a_divergence(name, alpha, inverse, limit):
    """f' of the sum is what IPO fits to E p / tau, and of sigmoid_norm f' / L to R / beta, as in TRL."""
    mean = PREFERENCE @ LOG_MU.exp()
    best = solved(inverse, limit, 1.0, mean / 2.0)
    assert slope(Criterion(2.0, (("ipo", 1.0),), divergence=name, alpha=alpha), best) < 1e-12
    best = solved(inverse, limit, LENGTHS.double(), REWARD / BETA)
    assert slope(Criterion(BETA, (("sigmoid_norm", 1.0),), divergence=name, alpha=alpha), best) < 1e-12


@pytest.mark.parametrize(("name", "alpha", "inverse", "limit"), FAMILIES, ids=IDS)
def test_the_derivative_is_the_inverse_of_the_inverse(name, alpha, inverse, limit):
    t = torch.tensor([-3.0, -0.5, 0.0, 0.4, 2.0], dtype=torch.float64)
    torch.testing.assert_close(inverse(divergence_scores(t, name, alpha)), t, rtol=1e-12, atol=1e-12)
    assert divergence_scores(torch.zeros(1), name, alpha).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(("name", "alpha"), [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 3.0)])
def test_ratios_beyond_any_exponent_stay_finite(name, alpha):
    far = torch.tensor([-500.0, 500.0], requires_grad=True)
    ref, ones = torch.zeros(2), torch.tensor([1, 1])
    for losses in ((("sigmoid", 1.0),), (("hinge", 1.0),)):
        found = preference_loss(Criterion(0.1, losses, divergence=name, alpha=alpha), far, ref, ones, None)
        assert torch.isfinite(found.loss) and torch.isfinite(torch.autograd.grad(found.loss, far)[0]).all()
        assert torch.isfinite(found.chosen_rewards).all() and torch.isfinite(found.rejected_rewards).all()


def test_the_implicit_reward_is_beta_times_the_derivative():
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    criterion = Criterion(0.5, divergence="forward_kl")
    found = preference_loss(criterion, logprobs, ref, torch.tensor([1, 2]), None)
    assert found.chosen_rewards.item() == pytest.approx(0.5 * (1 - math.exp(-1)), abs=1e-6)
    assert found.rejected_rewards.item() == pytest.approx(0.5 * (1 - math.e), abs=1e-6)
