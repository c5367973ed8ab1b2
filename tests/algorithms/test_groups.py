"""Advantages of groups by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.algorithms.groups import group_advantages, leave_one_out_advantages, to_tokens

RETURNS = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0], dtype=torch.float64)


def test_leave_one_out_by_hand():
    """The others have the means 4, 3.5, 1.5 and 1.5, 1.5, 0."""
    assert leave_one_out_advantages(RETURNS, 3).tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_groups_by_hand():
    """The means are 3 and 1, the sums of squares 14 and 6, the standard deviations sqrt(7) and sqrt(3)."""
    assert group_advantages(RETURNS, 3, scale=False).tolist() == [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]
    scaled = group_advantages(RETURNS, 3, scale=True).tolist()
    first, second = 7**0.5 + 1e-4, 3**0.5 + 1e-4
    assert scaled == pytest.approx([-2 / first, -1 / first, 3 / first, -1 / second, -1 / second, 2 / second], abs=1e-14)


def test_equal_returns_have_no_advantage():
    same = torch.full((4,), 0.3, dtype=torch.float64)
    assert leave_one_out_advantages(same, 2).tolist() == [0.0] * 4
    assert group_advantages(same, 4, scale=True).tolist() == [0.0] * 4


def test_a_response_has_one_value_at_all_of_its_tokens():
    mask = torch.tensor([[True, True], [True, False]])
    assert to_tokens(torch.tensor([2.0, 3.0]), mask).tolist() == [[2.0, 2.0], [3.0, 0.0]]
