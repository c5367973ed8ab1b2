"""Losses on preferences, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.preference import bradley_terry_loss, centering_loss, correct, dpo_sigmoid_loss


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CHOSEN, REJECTED = vector(1.0, -0.5, 2.0), vector(0.0, 0.5, 2.0)


def test_bradley_terry_of_a_zero_head_is_log_2_a_pair():
    assert bradley_terry_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(3 * math.log(2), abs=1e-6)


def test_bradley_terry_by_hand():
    expected = -sum(math.log(sigmoid(d)) for d in (1.0, -1.0, 0.0))
    assert bradley_terry_loss(CHOSEN, REJECTED).item() == pytest.approx(expected, abs=1e-12)
    with_margin = -sum(math.log(sigmoid(d)) for d in (0.5, -1.0, -2.0))
    found = bradley_terry_loss(CHOSEN, REJECTED, vector(0.5, 0.0, 2.0))
    assert found.item() == pytest.approx(with_margin, abs=1e-12)


def test_bradley_terry_is_invariant_to_a_constant_per_prompt():
    shift = vector(100.0, -3.0, 0.7)
    found = bradley_terry_loss(CHOSEN + shift, REJECTED + shift)
    assert found.item() == pytest.approx(bradley_terry_loss(CHOSEN, REJECTED).item(), abs=1e-12)


def test_bradley_terry_gradient_is_minus_sigma_of_the_negative_difference():
    scores = torch.stack([CHOSEN, REJECTED]).requires_grad_()
    (slope,) = torch.autograd.grad(bradley_terry_loss(scores[0], scores[1]), scores)
    wrong = [sigmoid(-1.0), sigmoid(1.0), 0.5]
    assert slope[0].tolist() == pytest.approx([-p for p in wrong], abs=1e-12)
    assert slope[1].tolist() == pytest.approx(wrong, abs=1e-12)


def test_huge_differences_stay_finite():
    assert bradley_terry_loss(vector(-1e4), vector(1e4)).item() == pytest.approx(2e4)
    assert bradley_terry_loss(vector(1e4), vector(-1e4)).item() == 0.0


def test_centering_by_hand():
    assert centering_loss(CHOSEN, REJECTED).item() == pytest.approx(1 + 0 + 16, abs=1e-12)


def test_a_tie_is_half_correct():
    assert correct(CHOSEN, REJECTED).tolist() == [1.0, 0.0, 0.5]


@pytest.fixture
def logps():
    """chosen, rejected, reference of chosen, reference of rejected: three pairs."""
    return vector(-4.0, -7.0, -3.5), vector(-5.0, -6.0, -3.0), vector(-4.5, -6.0, -3.5), vector(-4.0, -6.5, -2.0)


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_dpo_by_hand(logps, beta):
    # log-ratios of chosen: .5, -1, 0; of rejected: -1, .5, -1; so h = beta x (1.5, -1.5, 1)
    found = dpo_sigmoid_loss(*logps, beta=beta)
    expected = -sum(math.log(sigmoid(beta * h)) for h in (1.5, -1.5, 1.0))
    assert found.loss.item() == pytest.approx(expected, abs=1e-12)
    assert found.chosen_rewards.tolist() == pytest.approx([0.5 * beta, -beta, 0.0], abs=1e-12)
    assert found.rejected_rewards.tolist() == pytest.approx([-beta, 0.5 * beta, -beta], abs=1e-12)
    assert not found.chosen_rewards.requires_grad


def test_dpo_at_the_reference_is_log_2_with_margins_0(logps):
    chosen, rejected, *_ = logps
    found = dpo_sigmoid_loss(chosen.requires_grad_(), rejected, chosen.detach(), rejected, beta=0.7)
    assert found.loss.item() == pytest.approx(3 * math.log(2), abs=1e-12)
    assert not (found.chosen_rewards - found.rejected_rewards).any()
    assert not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad


def test_dpo_gradient_is_minus_beta_sigma_of_minus_h(logps):
    beta = 0.5
    inputs = [x.clone().requires_grad_() for x in logps]
    slopes = torch.autograd.grad(dpo_sigmoid_loss(*inputs, beta=beta).loss, inputs[:2])
    weight = [beta * sigmoid(-beta * h) for h in (1.5, -1.5, 1.0)]
    assert slopes[0].tolist() == pytest.approx([-w for w in weight], abs=1e-12)
    assert slopes[1].tolist() == pytest.approx(weight, abs=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: dpo_sigmoid_loss(a, b, *logps[2:], beta=beta).loss, inputs[:2])


def test_the_population_gradient_of_dpo_is_0_at_the_optimum_and_not_at_the_reference():
    beta, count = 0.5, 7
    draw = torch.Generator().manual_seed(0)
    ref = torch.log_softmax(torch.randn(count, generator=draw, dtype=torch.float64), -1)
    reward = torch.randn(count, generator=draw, dtype=torch.float64)

    def gradient(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone().requires_grad_()
        logprobs = torch.log_softmax(logits, -1)
        total = 0.0
        for i in range(count):
            for j in range(count):
                if i != j:
                    # Both drawn from the reference, i preferred with probability sigma(r_i - r_j).
                    weight = (ref[i] + ref[j]).exp() * torch.sigmoid(reward[i] - reward[j])
                    pair = [x[None] for x in (logprobs[i], logprobs[j], ref[i], ref[j])]
                    total = total + weight * dpo_sigmoid_loss(*pair, beta=beta).loss
        return torch.autograd.grad(total, logits)[0]

    assert gradient(ref + reward / beta).abs().max().item() < 1e-15
    assert gradient(ref).abs().max().item() > 1e-3
    assert gradient(ref + reward / (2 * beta)).abs().max().item() > 1e-3
