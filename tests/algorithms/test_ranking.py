"""Losses on rankings: weighted pairs and Plackett-Luce, against enumeration and closed forms."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from rlhf_pipeline.algorithms.preference import (
    bradley_terry_loss,
    centering_loss,
    dpo_sigmoid_loss,
    ipo_loss,
    plackett_luce_loss,
)

# Three prompts with 4, 2 and 3 completions; in the first two are tied, so 5 of its 6 pairs are not.
SCORES = [0.3, -1.2, 2.0, 0.7, 1.1, -0.4, 0.0, 0.9, -0.8]
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (4, 5), (6, 7), (6, 8), (7, 8)]
WEIGHT = [1 / 5] * 5 + [1.0] + [1 / 3] * 3


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sides(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    better, worse = torch.tensor(PAIRS).unbind(1)
    return values.index_select(0, better), values.index_select(0, worse)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_weighted_pairs_by_hand():
    chosen, rejected = sides(vector(*SCORES))
    found = bradley_terry_loss(chosen, rejected, weight=vector(*WEIGHT))
    expected = sum(w * softplus(SCORES[j] - SCORES[i]) for (i, j), w in zip(PAIRS, WEIGHT, strict=True))
    assert found.item() == pytest.approx(expected, abs=1e-12)
    centred = centering_loss(chosen, rejected, weight=vector(*WEIGHT))
    expected = sum(w * (SCORES[j] + SCORES[i]) ** 2 for (i, j), w in zip(PAIRS, WEIGHT, strict=True))
    assert centred.item() == pytest.approx(expected, abs=1e-12)


def test_margins_belong_to_single_pairs():
    margins = [0.5, 0.0, 0.0, 1.5, 0.0, 2.0, 0.0, 0.0, -0.5]
    found = bradley_terry_loss(*sides(vector(*SCORES)), vector(*margins), weight=vector(*WEIGHT))
    terms = zip(PAIRS, WEIGHT, margins, strict=True)
    expected = sum(w * softplus(SCORES[j] - SCORES[i] + margin) for (i, j), w, margin in terms)
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", [dpo_sigmoid_loss, ipo_loss])
def test_weights_of_dpo_are_those_of_its_pairs(loss):
    chosen, rejected = sides(vector(*SCORES))
    zero = torch.zeros_like(chosen)
    found = loss(chosen, rejected, zero, zero, beta=0.3, weight=vector(*WEIGHT)).loss
    single = [loss(c, r, z, z, beta=0.3).loss for c, r, z in zip(chosen[:, None], rejected[:, None], zero[:, None])]
    assert found.item() == pytest.approx(sum(w * float(x) for w, x in zip(WEIGHT, single)), abs=1e-12)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(AssertionError):
        bradley_terry_loss(vector(1.0, 2.0), vector(0.0, 0.0), weight=vector(1.0))


def plackett_luce(scores: list[list[float]], beta: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its input (E, K), padded with zeros; `scores` are log-ratios."""
    width = max(map(len, scores))
    rows = torch.zeros(len(scores), width, dtype=torch.float64)
    mask = torch.zeros(len(scores), width, dtype=torch.bool)
    for row, (values, there) in enumerate(zip(scores, (len(s) for s in scores), strict=True)):
        rows[row, :there], mask[row, :there] = vector(*values), True
    rows.requires_grad_()
    return plackett_luce_loss(rows, torch.zeros_like(rows), mask, beta=beta), rows


def test_plackett_luce_by_hand():
    a, b, c = 0.5, -1.0, 2.0
    found, _ = plackett_luce([[a, b, c]])
    first = math.exp(a) / (math.exp(a) + math.exp(b) + math.exp(c))
    second = math.exp(b) / (math.exp(b) + math.exp(c))
    assert found.item() == pytest.approx(-math.log(first * second), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_its_gradient_for_three_by_hand(beta):
    a, b, c = (math.exp(beta * s) for s in (0.5, -1.0, 2.0))
    found, rows = plackett_luce([[0.5, -1.0, 2.0]], beta)
    (slope,) = torch.autograd.grad(found, rows)
    # The first is chosen among three, the second among two, the third alone.
    expected = [a / (a + b + c) - 1, b / (a + b + c) + b / (b + c) - 1, c / (a + b + c) + c / (b + c) + 1 - 1]
    assert slope[0].tolist() == pytest.approx([beta * value for value in expected], abs=1e-12)


def test_two_completions_have_the_sigmoid_loss_and_its_gradient():
    logps = [vector(-4.0, -7.0, -3.5), vector(-5.0, -6.0, -3.0), vector(-4.5, -6.0, -3.5), vector(-4.0, -6.5, -2.0)]
    inputs = [x.clone().requires_grad_() for x in logps]
    rows, ref_rows = torch.stack(inputs[:2], 1), torch.stack(inputs[2:], 1)
    listed = plackett_luce_loss(rows, ref_rows, torch.ones_like(rows, dtype=torch.bool), beta=0.7)
    paired = dpo_sigmoid_loss(*inputs, beta=0.7).loss
    assert listed.item() == pytest.approx(paired.item(), abs=1e-12)
    slopes = [torch.autograd.grad(loss, inputs) for loss in (listed, paired)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_probabilities_of_all_orders_add_up_to_1():
    scores = [0.5, -1.0, 2.0, 0.1]
    total = sum(math.exp(-plackett_luce([list(order)])[0].item()) for order in permutations(scores))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_a_constant_per_prompt_changes_nothing():
    one, other = plackett_luce([[0.5, -1.0, 2.0]])[0], plackett_luce([[100.5, 99.0, 102.0]])[0]
    assert one.item() == pytest.approx(other.item(), abs=1e-10)


def test_rankings_of_different_length_add_up_and_what_is_not_there_has_no_gradient():
    scores = [[0.5, -1.0, 2.0, 0.3], [1.0, 0.2], [-0.5, 0.4, 0.1]]
    found, rows = plackett_luce(scores)
    alone = [plackett_luce([row]) for row in scores]
    assert found.item() == pytest.approx(sum(loss.item() for loss, _ in alone), abs=1e-12)
    (slope,) = torch.autograd.grad(found, rows)
    for row, (loss, own) in zip(slope, alone, strict=True):
        (expected,) = torch.autograd.grad(loss, own)
        there = expected.shape[1]
        torch.testing.assert_close(row[:there], expected[0], rtol=0, atol=1e-12)
        assert not row[there:].any()


def test_whatever_stands_where_there_is_no_response_stays_out():
    rows = vector(0.5, -1.0, math.nan)[None].requires_grad_()
    mask = torch.tensor([[True, True, False]])
    loss = plackett_luce_loss(rows, torch.zeros_like(rows), mask, beta=1.0)
    (slope,) = torch.autograd.grad(loss, rows)
    assert loss.item() == pytest.approx(softplus(-1.5), abs=1e-12) and torch.isfinite(slope).all()


def test_huge_differences_stay_finite():
    wrong, rows = plackett_luce([[-1e4, 1e4, 0.0]])
    assert wrong.item() == pytest.approx(2e4) and torch.isfinite(torch.autograd.grad(wrong, rows)[0]).all()
    assert plackett_luce([[1e4, 0.0, -1e4]])[0].item() == 0.0


def test_single_precision_is_kept_and_other_shapes_are_refused():
    rows, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    loss = plackett_luce_loss(rows, rows, mask, beta=0.5)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(2 * math.log(6), abs=1e-6)
    for wrong in ((rows[:1], rows, mask), (rows, rows[:, :2], mask), (rows, rows, mask[:1]), (rows[0],) * 2 + (mask,)):
        with pytest.raises(AssertionError):
            plackett_luce_loss(*wrong, beta=0.5)
