"""Windows: what they hold depends on seed and step alone, and their denominators are global."""

from __future__ import annotations

import pytest

from rlhf_pipeline.data.batch import fill_rows
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.training.windows import epoch_order, example_windows, steps_per_epoch, total_steps


def examples(count: int) -> list[Example]:
    """Examples whose completion has 1 + i % 3 tokens."""
    return [Example([2, 3], [[4] * (1 + i % 3)], [True], str(i), str(i)) for i in range(count)]


def members(windows) -> list[list[int]]:
    return [sorted(i for batch in window.micro_batches for i in batch.indices if batch.weight) for window in windows]


def windows(count=10, steps=6, size=4, accumulation=1, **options):
    options = {"seed": 0, **options}
    return list(
        example_windows(examples(count), steps=steps, micro_batch_size=size, accumulation=accumulation, **options)
    )


def test_epoch_order_is_a_permutation_that_seed_and_epoch_decide():
    assert sorted(epoch_order(20, 3, 1)) == list(range(20))
    assert epoch_order(20, 3, 1) == epoch_order(20, 3, 1)
    assert len({tuple(epoch_order(20, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("count", "size", "epochs", "limit", "expected"),
    [
        (10, 4, 1, -1, 3),
        (10, 4, 2, -1, 6),
        (10, 4, 0.5, -1, 2),
        (8, 4, 1.5, -1, 3),
        (10, 4, 9, 2, 2),
        (1, 8, 0.1, -1, 1),
    ],
)
def test_total_steps(count, size, epochs, limit, expected):
    assert total_steps(count, size, epochs, limit) == expected


def test_each_epoch_holds_every_example_once_and_its_last_window_the_rest():
    found = members(windows(count=10, steps=6, size=4))
    assert [len(window) for window in found] == [4, 4, 2, 4, 4, 2]
    for epoch in (found[:3], found[3:]):
        assert sorted(index for window in epoch for index in window) == list(range(10))
    assert found[:3] != found[3:]
    assert steps_per_epoch(10, 4) == 3


@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (8, 1), (2, 4), (4, 2)])
def test_members_do_not_depend_on_how_a_window_is_cut(size, accumulation):
    found = windows(count=21, steps=5, size=size, accumulation=accumulation)
    assert members(found) == members(windows(count=21, steps=5, size=8))
    assert all(len(batch.indices) <= size for window in found for batch in window.micro_batches)


def test_members_are_the_same_after_a_resume():
    assert members(windows(count=10, steps=7, start=4)) == members(windows(count=10, steps=7))[4:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_a_window_and_agree_on_its_denominators(ranks):
    whole = windows(count=13, steps=6, size=6)
    shares = [windows(count=13, steps=6, size=6 // ranks, rank=rank, world_size=ranks) for rank in range(ranks)]
    for step, window in enumerate(whole):
        together = sorted(index for share in shares for index in members([share[step]])[0])
        assert together == members([window])[0]
        assert all(share[step].counts == window.counts for share in shares)
        assert all(share[step].epoch == window.epoch for share in shares)


def test_a_rank_without_an_example_gets_a_stand_in_of_weight_0():
    # 5 examples in windows of 4: the second window has one, which rank 0 trains on.
    second = [windows(count=5, steps=2, size=2, rank=rank, world_size=2)[1] for rank in (0, 1)]
    assert [batch.weight for window in second for batch in window.micro_batches] == [1.0, 0.0]
    assert second[0].counts == second[1].counts


def test_counts_add_up_over_the_window():
    (window,) = windows(count=6, steps=1, size=2, accumulation=3)
    assert window.counts == {"prompts": 6, "pairs": 0, **dict.fromkeys(("tokens", "chosen_tokens"), 2 * (1 + 2 + 3))}
    assert window.epoch == 1.0


def test_rows_are_filled_best_fit_longest_first():
    # 7 opens a row with room for 3, 6 one with room for 4; 4 fits the second, 3 the first, 2 opens a third.
    assert fill_rows([4, 7, 2, 6, 3], 10) == [[1, 4], [3, 0], [2]]
    assert fill_rows([5, 5, 5], 10) == [[0, 1], [2]]
    assert fill_rows([12, 3], 10) == [[0], [1]]


def test_packed_windows_count_rows_of_tokens():
    """Examples of 3, 4 and 5 tokens in rows of 8: a window of two rows has all of their examples."""
    bins = fill_rows([3 + i % 3 for i in range(10)], 8)
    assert sorted(index for row in bins for index in row) == list(range(10)) and len(bins) == 5
    found = windows(count=10, steps=6, size=1, accumulation=2, bins=bins, bin_tokens=8)
    per_window = members(found)
    order = [index for epoch in (0, 1) for index in epoch_order(5, 0, epoch)]
    expected = [order[:2], order[2:4], order[4:5], order[5:7], order[7:9], order[9:]]
    assert per_window == [sorted(i for row in chosen for i in bins[row]) for chosen in expected]
    for window in found:
        for batch in window.micro_batches:
            assert sum(len(example.prompt_ids) + len(example.completions[0]) for example in batch.examples) <= 8
    assert [window.epoch for window in found] == [(step + 1) / 3 for step in range(6)]


def test_ranks_share_the_rows_of_a_packed_window():
    bins = [[0, 1], [2], [3, 4, 5]]
    parts = [
        members(windows(count=6, steps=1, size=1, accumulation=1, bins=bins, bin_tokens=99, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert sorted(tuple(part[0]) for part in parts) == [(0, 1), (2,), (3, 4, 5)]
