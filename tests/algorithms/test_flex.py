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
    assert flex_plan([(200, (56,)), (256, ())]).to_dense().sum() == 6
    # 100 + 100 + 100: the second tree stands in blocks 0 and 1, the third in 1 and 2; block 2 does not see block 0.
    assert flex_plan([(100, ()), (90, (10,)), (100, ())]).to_dense()[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


SHAPE = ("cpu", torch.float32, 16, (4, 2))


@pytest.fixture
def afresh():
    flex_works.cache_clear()
    yield
    flex_works.cache_clear()


def fake(fault: Exception | None = None, factor: float = 1.0):
    """What a compiled kernel would do, by tree attention: FlexAttention has no backward pass on a CPU."""

    def attend(query, key, value, plan, *, scale):
        if fault is not None:
            raise fault
        trees = [(150, (20, 35)), (9, (5,)), (40, (1, 2, 3))]
        return tree_attention(query, key, value, attention_plan(trees), scale=factor * scale)

    return attend


@torch.no_grad()
def test_it_is_used_where_it_agrees_also_if_asked_without_gradients(monkeypatch, afresh):
    monkeypatch.setattr(flex, "flex_tree_attention", fake())
    assert flex_works(*SHAPE)


@pytest.mark.parametrize("made", [fake(RuntimeError("no compiler")), fake(factor=1.5)], ids=["fails", "differs"])
def test_where_it_fails_or_differs_it_is_not_used(monkeypatch, afresh, made):
    monkeypatch.setattr(flex, "flex_tree_attention", made)
    assert not flex_works(*SHAPE)
