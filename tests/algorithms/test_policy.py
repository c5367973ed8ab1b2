"""PPO's losses: closed-form gradients by the sign of the advantage and the side of the clip."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.policy import clipped_policy_loss, clipped_value_loss

EPS = 0.2
ON = torch.ones(1, 1, dtype=torch.bool)


def cell(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope, clipped",
    [
        # loss = max(-A rho, -A clip(rho)); d loss / d log pi = -A rho, or 0 where the clip binds.
        (2.0, 1.0, -2.0, -2.0, 0),
        (2.0, 1.1, -2.2, -2.2, 0),
        (2.0, 1.5, -2.4, 0.0, 1),
        (2.0, 0.5, -1.0, -1.0, 0),
        (-2.0, 1.0, 2.0, 2.0, 0),
        (-2.0, 0.9, 1.8, 1.8, 0),
        (-2.0, 0.5, 1.6, 0.0, 1),
        (-2.0, 1.5, 3.0, 3.0, 0),
        (0.0, 1.5, 0.0, 0.0, 0),
    ],
)
def test_policy_loss_and_its_gradient(advantage, ratio, loss, slope, clipped):
    old = cell(-1.3)
    logprobs = (old + math.log(ratio)).requires_grad_()
    found = clipped_policy_loss(logprobs, old, cell(advantage), ON, cliprange=EPS)
    assert found.loss.item() == pytest.approx(loss, abs=1e-12)
    assert found.clipped.item() == clipped
    assert found.ratio.item() == pytest.approx(ratio, abs=1e-12)
    assert found.ratio_square.item() == pytest.approx(ratio**2, abs=1e-12)
    assert found.approx_kl.item() == pytest.approx(math.log(ratio) ** 2 / 2, abs=1e-12)
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert gradient.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize(
    "value, old, target, loss, slope, clipped",
    [
        # 0.5 max((V - G)^2, (clip(V, old +- .2) - G)^2): the clipped branch is constant in V.
        (1.1, 1.0, 2.0, 0.405, -0.9, 0),  # within the range: both agree
        (1.5, 1.0, 2.0, 0.32, 0.0, 1),  # moved towards G beyond the range: limited at 1.2
        (0.5, 1.0, 2.0, 1.125, -1.5, 0),  # moved away from G: not limited
        (2.5, 1.0, 1.0, 1.125, 1.5, 0),
        (0.5, 1.0, 0.0, 0.32, 0.0, 1),  # limited at 0.8
    ],
)
def test_value_loss_is_clipped_around_the_old_value(value, old, target, loss, slope, clipped):
    values = cell(value).requires_grad_()
    found, count = clipped_value_loss(values, cell(old), cell(target), ON, cliprange_value=EPS)
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert count.item() == clipped
    (gradient,) = torch.autograd.grad(found, values)
    assert gradient.item() == pytest.approx(slope, abs=1e-12)


@pytest.fixture
def rows():
    """(3, 4) log-probabilities, old ones, advantages and a ragged mask."""
    draw = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 4, generator=draw, dtype=torch.float64) - 0.1
    new = old + 0.4 * torch.randn(3, 4, generator=draw, dtype=torch.float64)
    advantages = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    return new, old, advantages, torch.arange(4) < torch.tensor([4, 1, 2])[:, None]


def test_at_ratio_1_nothing_is_clipped_and_the_gradient_is_minus_a(rows):
    _, old, advantages, mask = rows
    logprobs = old.clone().requires_grad_()
    found = clipped_policy_loss(logprobs, old, advantages, mask, cliprange=EPS)
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages, 0.0), rtol=0, atol=1e-15)
    assert (found.clipped.item(), found.approx_kl.item(), found.ratio.item()) == (0, 0.0, 7.0)


def test_the_loss_is_a_sum_over_active_tokens(rows):
    new, old, advantages, mask = rows
    expected = 0.0
    for c, t in mask.nonzero().tolist():
        rho, a = math.exp(new[c, t] - old[c, t]), advantages[c, t].item()
        expected += max(-a * rho, -a * min(max(rho, 1 - EPS), 1 + EPS))
    assert clipped_policy_loss(*rows, cliprange=EPS).loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("filler", [math.nan, math.inf, 1e30])
def test_inactive_entries_of_any_input_leave_loss_and_gradient_alone(rows, filler):
    mask = rows[-1]

    def evaluate(fill):
        x = [value if fill is None else torch.where(mask, value, fill) for value in rows[:3]]
        x[0] = x[0].requires_grad_()
        policy = clipped_policy_loss(*x, mask, cliprange=EPS)
        loss, count = clipped_value_loss(*x, mask, cliprange_value=EPS)
        (slope,) = torch.autograd.grad(policy.loss + loss, x[0])
        figures = [policy.loss, policy.clipped, policy.approx_kl, policy.ratio, policy.ratio_square, loss, count]
        return torch.stack(figures).detach(), slope

    (clean, slope), (dirty, dirty_slope) = evaluate(None), evaluate(filler)
    assert torch.equal(clean, dirty)
    assert torch.equal(slope, dirty_slope)
    assert not dirty_slope[~mask].any()


def test_padding_changes_no_sum(rows):
    wide = [torch.nn.functional.pad(x, (0, 3, 0, 2), value=0) for x in rows]
    one, other = clipped_policy_loss(*rows, cliprange=EPS), clipped_policy_loss(*wide, cliprange=EPS)
    for name in ("loss", "clipped", "approx_kl", "ratio", "ratio_square"):
        assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), abs=1e-12)


def test_statistics_carry_no_gradient(rows):
    new = rows[0].clone().requires_grad_()
    found = clipped_policy_loss(new, *rows[1:], cliprange=EPS)
    assert found.loss.requires_grad
    assert not any(x.requires_grad for x in (found.clipped, found.approx_kl, found.ratio, found.ratio_square))


def test_gradcheck_away_from_the_kinks(rows):
    new, old, advantages, mask = rows
    one = new.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, old, advantages, mask, cliprange=EPS).loss, one)
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, advantages, mask, cliprange_value=EPS)[0], one)
