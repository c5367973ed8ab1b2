"""FlexAttention with trees as its block mask, on the CPU and not compiled: the same numbers as tree attention."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.algorithms import flex
from rlhf_pipeline.algorithms.attention import attention_plan, tree_attention
from rlhf_pipeline.algorithms.flex import flex_plan, flex_tree_attention, flex_works

TREES = [(5, (3, 4)), (2, ()), (40, (100, 1, 30)), (1, (1,))]
LENGTH = sum(prompt + sum(completions) for prompt, completions in TREES)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4, 60])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_it_agrees_with_tree_attention(window, heads):
    draw = torch.Generator().manual_seed(0)
    many, few = heads
    query, key, value = (torch.randn(count, LENGTH, 16, generator=draw) for count in (many, few, few))
    found = flex_tree_attention(query, key, value, flex_plan(TREES, window=window), scale=0.25)
    expected = tree_attention(query, key, value, attention_plan(TREES, window=window), scale=0.25)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_blocks_that_nobody_sees_are_left_out():
    """Two trees of 256 tokens in blocks of 128: of 16 blocks the 3 of each tree at or below its diagonal."""
    mask = flex_plan([(200, (56,)), (256, ())])
    assert mask.to_dense().sum() == 6


@pytest.mark.parametrize("fault", [RuntimeError("no compiler"), None])
def test_where_it_fails_or_differs_it_is_not_used(monkeypatch, fault):
    def broken(query, key, value, plan, *, scale):
        if fault is not None:
            raise fault
        return (value * query.mean() * key.mean()).repeat_interleave(2, 0)

    flex_works.cache_clear()
    monkeypatch.setattr(flex, "flex_tree_attention", broken)
    assert not flex_works("cpu")
    flex_works.cache_clear()
