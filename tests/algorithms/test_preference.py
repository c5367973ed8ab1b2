"""Losses on preferences, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.preference import (
    OBJECTIVES,
    bradley_terry_loss,
    centering_loss,
    correct,
    dpo_sigmoid_loss,
    ipo_loss,
    smoothed_target,
)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slope_of(x: float) -> float:
    """The derivative of sigma."""
    return sigmoid(x) * sigmoid(-x)


PAIR_LOSSES = [name for name, each in OBJECTIVES.items() if not each.listwise and each.needs_reference]
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


SIDES = ((0.5, -1.0, 0.0), (-1.0, 0.5, -1.0))  # log-ratios of the chosen and of the rejected responses of `logps`
LOG_RATIOS = (1.5, -1.5, 1.0)  # of `logps`: differences of the log-ratios, free of beta


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_by_hand(logps, tau):
    found = ipo_loss(*logps, beta=tau)
    assert found.loss.item() == pytest.approx(sum((d - 1 / (2 * tau)) ** 2 for d in LOG_RATIOS), abs=1e-12)
    assert found.chosen_rewards.tolist() == pytest.approx([0.5 * tau, -tau, 0.0], abs=1e-12)
    assert found.rejected_rewards.tolist() == pytest.approx([-tau, 0.5 * tau, -tau], abs=1e-12)
    assert ipo_loss(*(x.requires_grad_() for x in logps), beta=tau).chosen_rewards.requires_grad is False


def test_ipo_is_at_rest_at_its_margin_and_1_over_4_tau_squared_at_the_reference():
    one = vector(1 / (2 * 0.25)).requires_grad_()
    zero = vector(0.0)
    (slope,) = torch.autograd.grad(ipo_loss(one, zero, zero, zero, beta=0.25).loss, one)
    assert slope.item() == 0.0
    assert ipo_loss(zero, zero, zero, zero, beta=0.25).loss.item() == pytest.approx(4.0, abs=1e-12)


def test_hinge_by_hand(logps):
    found = OBJECTIVES["hinge"].loss(*logps, beta=1.0)  # h = 1.5, -1.5, 1
    assert found.loss.item() == pytest.approx(0 + 2.5 + 0, abs=1e-12)
    soft = OBJECTIVES["hinge"].loss(*logps, beta=1.0, target=vector(0.9, 0.2, 0.5)).loss.item()
    assert soft == pytest.approx(0.1 * 2.5 + 0.2 * 2.5 + 0.5 * 2, abs=1e-12)


def test_apo_down_by_hand(logps):
    found = OBJECTIVES["apo_down"].loss(*logps, beta=0.4)
    expected = sum(1 + sigmoid(0.4 * w) - sigmoid(0.4 * (w - x)) for w, x in zip(*SIDES, strict=True))
    assert found.loss.item() == pytest.approx(expected, abs=1e-12)
    assert found.chosen_rewards.tolist() == pytest.approx([0.4 * w for w in SIDES[0]], abs=1e-12)


@pytest.mark.parametrize("targets", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.3, 0.9, 0.5)])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_gradient_of_each_loss_by_hand(logps, name, targets):
    beta = 0.4
    inputs = [x.clone().requires_grad_() for x in logps]
    loss = OBJECTIVES[name].loss(*inputs, beta=beta, target=vector(*targets)).loss
    chosen, rejected, ref_chosen, ref_rejected = torch.autograd.grad(loss, inputs)
    if name == "apo_zero":  # each side by itself: (2 p - 1) beta sigma'(beta x), with the log-ratios x of both sides
        sides = [[beta * sigmoid(beta * x) * sigmoid(-beta * x) for x in side] for side in SIDES]
        ups, downs = ([(2 * p - 1) * slope for slope, p in zip(side, targets)] for side in sides)
        assert chosen.tolist() == pytest.approx([-up for up in ups], abs=1e-12)
        assert rejected.tolist() == pytest.approx(downs, abs=1e-12)
        assert torch.equal(ref_chosen, -chosen) and torch.equal(ref_rejected, -rejected)
        return
    if name == "apo_down":  # p [sigma(s_w) - sigma(h)] + (1 - p) [sigma(s_l) - sigma(-h)], s = beta x, h = s_w - s_l
        own = [[slope_of(beta * x) for x in side] for side in SIDES]
        joint = [(2 * p - 1) * slope_of(beta * d) for d, p in zip(LOG_RATIOS, targets)]
        ups = [beta * (p * s - j) for p, s, j in zip(targets, own[0], joint)]
        downs = [beta * ((1 - p) * s + j) for p, s, j in zip(targets, own[1], joint)]
        assert chosen.tolist() == pytest.approx(ups, abs=1e-12)
        assert rejected.tolist() == pytest.approx(downs, abs=1e-12)
        assert torch.equal(ref_chosen, -chosen) and torch.equal(ref_rejected, -rejected)
        return
    if name in ("sigmoid", "robust", "sigmoid_norm"):  # the means of sigmoid_norm are taken before
        expected = [beta * (sigmoid(beta * d) - p) for d, p in zip(LOG_RATIOS, targets)]
    elif name == "hinge":  # within the margin of 1 on both sides
        assert max(abs(beta * d) for d in LOG_RATIOS) < 1
        expected = [beta * (1 - 2 * p) for p in targets]
    else:
        expected = [2 * d - (2 * p - 1) / beta for d, p in zip(LOG_RATIOS, targets)]
    assert chosen.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(rejected, -chosen) and torch.equal(ref_chosen, -chosen) and torch.equal(ref_rejected, chosen)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_soft_label_is_the_average_over_hard_ones(logps, name):
    """p x loss(a preferred) + (1 - p) x loss(b preferred), in value and gradient; 1 is no target at all."""
    chosen, rejected, ref_chosen, ref_rejected = logps
    p = vector(0.2, 0.75, 1.0)

    def slopes(evaluate):
        inputs = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
        loss = evaluate(*inputs)
        return loss, torch.autograd.grad(loss, inputs)

    loss_of = OBJECTIVES[name].loss

    def hard(a, b):
        total = 0.0
        for i in range(3):
            won = loss_of(a[i : i + 1], b[i : i + 1], ref_chosen[i : i + 1], ref_rejected[i : i + 1], beta=0.5).loss
            lost = loss_of(b[i : i + 1], a[i : i + 1], ref_rejected[i : i + 1], ref_chosen[i : i + 1], beta=0.5).loss
            total = total + p[i] * won + (1 - p[i]) * lost
        return total

    soft, soft_slopes = slopes(lambda a, b: loss_of(a, b, ref_chosen, ref_rejected, beta=0.5, target=p).loss)
    average, average_slopes = slopes(hard)
    assert soft.item() == pytest.approx(average.item(), abs=1e-12)
    for one, other in zip(soft_slopes, average_slopes):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    certain = loss_of(*logps, beta=0.5, target=torch.ones(3, dtype=torch.float64)).loss
    assert certain.item() == pytest.approx(loss_of(*logps, beta=0.5).loss.item(), abs=1e-12)


@pytest.mark.parametrize("target", [None, 0.0, 0.3, 1.0])
def test_at_h_0_the_sigmoid_loss_is_log_2_whatever_the_label(logps, target):
    chosen, rejected, *_ = logps
    target = None if target is None else vector(*[target] * 3)
    found = dpo_sigmoid_loss(chosen, rejected, chosen, rejected, beta=0.7, target=target)
    assert found.loss.item() == pytest.approx(3 * math.log(2), abs=1e-12)


def test_smoothing_by_hand():
    assert smoothed_target(None, 0.0) is None
    assert smoothed_target(None, 0.1).item() == pytest.approx(0.9, abs=1e-15)
    p = vector(0.0, 0.2, 0.5, 1.0)
    assert smoothed_target(p, 0.1).tolist() == pytest.approx([0.1, 0.26, 0.5, 0.9], abs=1e-15)
    assert torch.equal(smoothed_target(p, 0.0), p)


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.4])
def test_the_smoothed_loss_is_mitchells_and_at_rest_where_sigma_is_1_minus_eps(logps, eps):
    target = smoothed_target(None, eps)
    found = dpo_sigmoid_loss(*logps, beta=0.5, target=target).loss.item()
    h = [0.5 * d for d in LOG_RATIOS]
    expected = sum(-(1 - eps) * math.log(sigmoid(x)) - eps * math.log(sigmoid(-x)) for x in h)
    assert found == pytest.approx(expected, abs=1e-12)
    rest, zero = vector(math.log((1 - eps) / eps) / 0.5).requires_grad_(), vector(0.0)
    (slope,) = torch.autograd.grad(dpo_sigmoid_loss(rest, zero, zero, zero, beta=0.5, target=target).loss, rest)
    assert abs(slope.item()) < 1e-15


def test_smoothing_keeps_single_precision():
    single = [vector(-4.0, -7.0).float() for _ in range(4)]
    assert dpo_sigmoid_loss(*single, beta=0.5, target=smoothed_target(None, 0.1)).loss.dtype == torch.float32


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_table_says_what_a_loss_reads(logps, name):
    chosen, rejected, *_ = logps
    objective = OBJECTIVES[name]
    losses = {objective.loss(*inputs, beta=0.5).loss.item() for inputs in (logps, (chosen, rejected, chosen, rejected))}
    assert len(losses) == 2  # every one reads the reference
    assert objective.length_normalised == name.endswith(("_mean", "_norm"))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("odd", range(4))
def test_inputs_of_another_shape_are_refused(logps, name, odd):
    inputs = [x[:2] if place == odd else x for place, x in enumerate(logps)]
    with pytest.raises(AssertionError):
        OBJECTIVES[name].loss(*inputs, beta=0.5)
