"""Running moments: by hand, in parts, and over processes."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.algorithms.moments import Moments


def test_by_hand():
    first = Moments().merged(Moments.of(torch.tensor([1.0, 3.0])))
    assert (first.count, first.mean, first.std) == (2, 2, 1)
    both = first.merged(Moments.of(torch.tensor([5.0, 7.0])))
    assert (both.count, both.mean) == (4, 4) and both.std == pytest.approx(5**0.5, abs=1e-15)


@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 2, 2], [1] * 7])
def test_parts_have_the_moments_of_the_whole_far_from_zero(sizes):
    values = 1e6 + torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Moments()
    for part in values.split(sizes):
        found = found.merged(Moments.of(part))
    assert found.count == 7
    assert found.mean == pytest.approx(values.mean().item(), rel=1e-14)
    assert found.std == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_two_processes_have_the_moments_of_both():
    parts = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([7.0, -1.0, 3.0])]
    sums: list[torch.Tensor] = []
    Moments.of(parts[1], lambda mine: sums.append(mine) or mine)
    first = sums[0]

    def reduce(mine: torch.Tensor) -> torch.Tensor:
        if len(mine) == 2:
            return mine + first
        return mine + ((parts[1].double() - 3) ** 2).sum()  # the mean of all is 3

    assert Moments.of(parts[0], reduce) == Moments(6, 3, pytest.approx((46 / 6) ** 0.5))
