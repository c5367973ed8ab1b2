"""Masked statistics: by hand, and blind to whatever stands in inactive entries."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.masked import masked_mean, masked_sum, moments, whiten

VALUES = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize("filler", [0.0, 7.0, math.nan, math.inf, -math.inf])
def test_what_stands_in_inactive_entries_never_matters(filler):
    values = torch.where(MASK, VALUES, filler)
    assert masked_sum(values, MASK).item() == 7.0
    assert masked_sum(values, MASK, 1).tolist() == [3.0, 4.0]
    assert masked_sum(values, MASK, 0).tolist() == [5.0, 2.0, 0.0]
    assert masked_mean(values, MASK).item() == pytest.approx(7 / 3, abs=1e-15)
    assert torch.equal(whiten(values, MASK), whiten(VALUES, MASK))


def test_gradients_of_inactive_entries_are_zero_even_where_they_are_nan():
    values = torch.where(MASK, VALUES, math.nan).requires_grad_()
    masked_sum(values, MASK).backward()
    assert values.grad.tolist() == MASK.double().tolist()


def test_an_empty_mask_sums_to_zero():
    assert masked_sum(VALUES, torch.zeros_like(MASK)).item() == 0.0


def test_moments_by_hand():
    mean, var = moments(torch.tensor(4.0), torch.tensor(20.0), torch.tensor(120.0))
    assert (mean.item(), var.item()) == (5.0, 5.0)


def test_moments_of_equal_values_are_not_negative():
    count, value = torch.tensor(3.0), torch.tensor(0.1)
    assert moments(count, 3 * value, 3 * value**2)[1].item() >= 0.0


def test_whitened_values_by_hand():
    # 1, 2, 4: mean 7/3, population variance 21/3 - 49/9 = 14/9.
    scale = math.sqrt(14 / 9 + 1e-8)
    expected = [[(1 - 7 / 3) / scale, (2 - 7 / 3) / scale, 0.0], [(4 - 7 / 3) / scale, 0.0, 0.0]]
    torch.testing.assert_close(whiten(VALUES, MASK), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 3.0, -1e4])
def test_masked_mean_is_0_and_masked_variance_1(dtype, shift):
    draw = torch.Generator().manual_seed(3)
    values = (2.5 * torch.randn(16, 9, generator=draw, dtype=torch.float64) + shift).to(dtype)
    mask = torch.arange(9) < torch.randint(1, 10, (16, 1), generator=draw)
    active = whiten(values, mask)[mask].double()
    assert active.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert (active**2).mean().item() == pytest.approx(1.0, abs=1e-5)
    assert whiten(values, mask).dtype == dtype


def test_without_shift_the_mean_stays_and_only_the_variance_becomes_1():
    active = whiten(VALUES, MASK, shift_mean=False)[MASK]
    assert active.mean().item() == pytest.approx(7 / 3, abs=1e-12)
    assert active.var(correction=0).item() == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("columns, rows", [(1, 0), (5, 0), (0, 2), (4, 3)])
def test_padding_changes_no_whitened_value(columns, rows):
    values = torch.nn.functional.pad(VALUES, (0, columns, 0, rows), value=100.0)
    mask = torch.nn.functional.pad(MASK, (0, columns, 0, rows), value=False)
    padded = whiten(values, mask)
    torch.testing.assert_close(padded[:2, :3], whiten(VALUES, MASK), rtol=0, atol=1e-14)
    assert padded.abs().sum().item() == pytest.approx(whiten(VALUES, MASK).abs().sum().item(), abs=1e-12)


def test_two_ranks_whiten_as_one():
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 3, 4, 1])[:, None]
    sums = []
    for half in (slice(0, 2), slice(2, 6)):
        whiten(values[half], mask[half], reduce=lambda mine: sums.append(mine) or mine)
    total = sums[0] + sums[1]
    parts = [whiten(values[half], mask[half], reduce=lambda _: total) for half in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whiten(values, mask), rtol=0, atol=1e-14)


def test_values_that_are_all_equal_become_0():
    assert whiten(torch.full((2, 3), 5.0), MASK).abs().max().item() < 1e-6


@pytest.mark.parametrize("mask", [MASK[:, :2], MASK.double()])
def test_a_mask_of_another_shape_or_type_is_refused(mask):
    with pytest.raises(AssertionError):
        masked_sum(VALUES, mask)
