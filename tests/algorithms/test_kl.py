"""KL estimators, by exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.kl import k1, k2, k3


@pytest.fixture
def distributions():
    """log pi, log ref over six outcomes, and KL(pi || ref) summed in plain Python."""
    pi, ref = [0.4, 0.25, 0.15, 0.1, 0.07, 0.03], [0.1, 0.2, 0.3, 0.05, 0.05, 0.3]
    kl = math.fsum(p * math.log(p / q) for p, q in zip(pi, ref))
    return torch.tensor(pi, dtype=torch.float64).log(), torch.tensor(ref, dtype=torch.float64).log(), kl


def test_by_hand():
    logprobs, ref = torch.tensor([math.log(0.5)]).double(), torch.tensor([math.log(0.25)]).double()
    assert k1(logprobs, ref).item() == pytest.approx(math.log(2), abs=1e-7)
    assert k2(logprobs, ref).item() == pytest.approx(math.log(2) ** 2 / 2, abs=1e-7)
    assert k3(logprobs, ref).item() == pytest.approx(0.5 - 1 + math.log(2), abs=1e-7)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator, distributions):
    logprobs, ref, kl = distributions
    assert (logprobs.exp() * estimator(logprobs, ref)).sum().item() == pytest.approx(kl, abs=1e-14)


def test_k2_is_biased_and_has_its_own_mean(distributions):
    logprobs, ref, kl = distributions
    mean = (logprobs.exp() * k2(logprobs, ref)).sum().item()
    expected = math.fsum(math.exp(p) * (p - q) ** 2 / 2 for p, q in zip(logprobs.tolist(), ref.tolist()))
    assert mean == pytest.approx(expected, abs=1e-14)
    assert abs(mean - kl) > 1e-3


def test_k3_and_k2_are_never_negative_and_zero_only_at_equality():
    difference = torch.arange(-60, 61, dtype=torch.float64) / 10
    zero = torch.zeros_like(difference)
    for estimator in (k2, k3):
        values = estimator(difference, zero)
        assert (values[difference != 0] > 0).all()
        assert values[difference == 0].item() == 0.0


def test_gradient_of_k1_in_expectation_is_that_of_the_score_function(distributions):
    # grad KL = sum pi grad(log pi) (k1 + 1): REINFORCE with k1 as the cost; with k3 as the cost it is not.
    start, ref, _ = distributions
    logits = (start + torch.tensor([0.1, -0.3, 0.2, 0.0, 0.4, -0.2])).requires_grad_()
    logprobs = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)

    def reinforce(estimator):
        cost = estimator(logprobs, ref).detach()
        return torch.autograd.grad((logprobs.exp().detach() * cost * logprobs).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(reinforce(k1), exact, rtol=0, atol=1e-14)
    assert (reinforce(k3) - exact).abs().max().item() > 1e-2


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_shapes_must_agree(estimator):
    with pytest.raises(AssertionError):
        estimator(torch.zeros(3), torch.zeros(3, 1))
