"""Margins of pairs in the loss of the reward model and of DPO, against values by hand and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import bradley_terry_loss, dpo_sigmoid_loss

BETA, COUNT = 0.5, 6
DRAW = torch.Generator().manual_seed(0)
LOG_REF = torch.log_softmax(torch.randn(COUNT, generator=DRAW, dtype=torch.float64), -1)
REWARD, EXTRA = torch.randn(2, COUNT, generator=DRAW, dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_margin_is_subtracted_from_the_difference_of_the_scores():
    """sigma(log 3 - log 3) = 1/2, sigma(0 - log 3) = 1/4, sigma(log 3 + log 3) = 9/10."""
    scores, margin = (
        (numbers(math.log(3), 0, math.log(3)), numbers(0, 0, 0)),
        numbers(math.log(3), math.log(3), -math.log(3)),
    )
    expected = numbers(math.log(2), math.log(4), math.log(10 / 9))
    for weight in (numbers(1, 0, 0), numbers(0, 1, 0), numbers(0, 0, 1), numbers(1, 2, 3)):
        loss = bradley_terry_loss(*scores, margin, weight=weight)
        assert loss.item() == pytest.approx((weight * expected).sum().item(), abs=1e-15)


def test_the_margin_is_subtracted_from_the_difference_of_the_implicit_rewards_which_are_reported_without_it():
    """h = beta (2 log 3 - 0) - margin with beta 1/2; the slope of a pair is sigma(h) - 1 times beta."""
    chosen = numbers(-1 + 2 * math.log(3), -1, -1 + 2 * math.log(3)).requires_grad_()
    others = numbers(-2, -2, -2), numbers(-1, -1, -1), numbers(-2, -2, -2)
    margin = numbers(math.log(3), math.log(3), -math.log(3))
    result = dpo_sigmoid_loss(chosen, *others, beta=BETA, margin=margin)
    assert result.loss.item() == pytest.approx(math.log(2) + math.log(4) + math.log(10 / 9), abs=1e-14)
    (slope,) = torch.autograd.grad(result.loss, chosen)
    torch.testing.assert_close(slope, BETA * (numbers(0.5, 0.25, 0.9) - 1), rtol=0, atol=1e-15)
    torch.testing.assert_close(result.chosen_rewards, numbers(math.log(3), 0, math.log(3)), rtol=0, atol=1e-15)
    assert result.rejected_rewards.tolist() == [0, 0, 0]


def dpo_slope(log_pi: Tensor, margin: Callable[[int, int], float]) -> Tensor:
    """Gradient in the logits of the loss over all pairs, labelled by Bradley-Terry; margin(i, j): if i is chosen."""
    logits = log_pi.clone().requires_grad_()
    log_pi, total = torch.log_softmax(logits, -1), torch.zeros((), dtype=torch.float64)
    for i in range(COUNT):
        for j in set(range(COUNT)) - {i}:
            sides = [x[None] for x in (log_pi[i], log_pi[j], LOG_REF[i], LOG_REF[j])]
            loss = dpo_sigmoid_loss(*sides, beta=BETA, margin=numbers(margin(i, j))).loss
            total = total + torch.sigmoid(REWARD[i] - REWARD[j]) * loss
    return torch.autograd.grad(total, logits)[0]


def test_a_margin_that_is_a_difference_of_scores_is_added_to_the_reward():
    """With m(i, j) = M_i - M_j for both labels, h - m = R_i - R_j at the minimum: pi = ref exp((R + M) / beta) / Z."""
    margin = lambda i, j: float(EXTRA[i] - EXTRA[j])  # noqa: E731
    assert dpo_slope(LOG_REF + (REWARD + EXTRA) / BETA, margin).abs().max() < 1e-14
    assert dpo_slope(LOG_REF + REWARD / BETA, margin).abs().max() > 1e-2
    assert dpo_slope(LOG_REF + REWARD / BETA, lambda i, j: 0.0).abs().max() < 1e-14


@pytest.mark.parametrize("p", [0.5, 0.7, 0.99])
@pytest.mark.parametrize("margin", [0.0, 0.4, 3.0])
def test_one_margin_for_both_labels_widens_what_noise_has_left(p, margin):
    """x = e^h solves (1 - p) e^-m x^2 - (2p - 1) x - p e^-m = 0 for both losses: h = 0 at p = 1/2, logit p at m = 0."""
    g = math.exp(margin)
    root = math.log(((2 * p - 1) * g + math.sqrt((2 * p - 1) ** 2 * g**2 + 4 * p * (1 - p))) / (2 * (1 - p)))
    assert root == pytest.approx({0.0: math.log(p / (1 - p))}.get(margin, root)) and (p > 0.5) == (root > 1e-9)

    def slopes(difference: float) -> list[float]:
        r = numbers(difference).requires_grad_()
        zero, m = numbers(0), numbers(margin)
        scores = p * bradley_terry_loss(r, zero, m) + (1 - p) * bradley_terry_loss(zero, r, m)
        won = dpo_sigmoid_loss(r / BETA, zero, zero, zero, beta=BETA, margin=m).loss
        lost = dpo_sigmoid_loss(zero, r / BETA, zero, zero, beta=BETA, margin=m).loss
        return [torch.autograd.grad(loss, r)[0].item() for loss in (scores, p * won + (1 - p) * lost)]

    assert max(map(abs, slopes(root))) < 1e-14
    assert min(map(abs, slopes(root + 0.5))) > 1e-3
