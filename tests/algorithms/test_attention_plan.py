"""What attention within trees costs: pairs scored, memory of the masks."""

from __future__ import annotations

import pytest

from rlhf_pipeline.algorithms import attention
from rlhf_pipeline.algorithms.attention import attention_plan


@pytest.mark.parametrize("queries", [3, 16, 1000])
def test_hardly_a_pair_is_scored_in_vain(monkeypatch, queries):
    """A block of r queries is scored in vain against those of its own keys that stand behind each: r (r - 1) / 2."""
    monkeypatch.setattr(attention, "WHOLE", 0)
    monkeypatch.setattr(attention, "QUERIES", queries)
    plan = attention_plan(((50, (40, 31, 7)), (9, (120,))))
    sizes = [block.end - block.first for block in plan]
    assert max(sizes) <= queries and sum(sizes) == 50 + 40 + 31 + 7 + 9 + 120
    assert all(block.bias.shape[0] == size for block, size in zip(plan, sizes))
    # A prompt and its first completion are one sequence; every other one sees the prompt and itself.
    visible = sum(n * (n + 1) // 2 for n in (90, 129)) + sum(50 * n + n * (n + 1) // 2 for n in (31, 7))
    assert sum(int((block.bias == 0).sum()) for block in plan) == visible
    assert sum(block.bias.numel() for block in plan) == visible + sum(size * (size - 1) // 2 for size in sizes)


@pytest.mark.parametrize("window", [None, 100])
def test_the_masks_of_long_trees_take_memory_with_their_length(window):
    def taken(times: int) -> int:
        plan = attention_plan([(400 * times, (300 * times, 200 * times))] * 3, window=window)
        storages = [block.bias.untyped_storage() for block in plan]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    assert taken(8) <= 8 * taken(1)  # all pairs: 64 times


def test_trees_of_one_shape_share_their_masks():
    plan = attention_plan([(400, (300, 200))] * 5)
    assert len({block.bias.data_ptr() for block in plan}) == len(plan) // 5
