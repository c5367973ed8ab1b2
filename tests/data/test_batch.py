"""Packed batches, by hand and against a slow reading of the same examples."""

from __future__ import annotations

import random

import pytest
import torch

from rlhf_pipeline.data.batch import (
    FLAT_FROM,
    LAYOUTS,
    PackedBatch,
    common_layout,
    merge_prompts,
    micro_batches,
    pack,
    reads,
    tree_length,
)
from rlhf_pipeline.data.tokenize import Example

PAD = 0


def example(prompt: list[int], *completions: list[int]) -> Example:
    return Example(prompt, list(completions), [True] * len(completions), prompt_key=str(prompt), where="row 1")


PAIR = example([5, 6, 7], [8, 9], [10])
ONE = example([11], [12, 13, 14])


def many(count: int = 40, seed: int = 0) -> list[Example]:
    """Examples of random lengths whose tokens name their place: no two tokens of two examples are equal."""
    draw = random.Random(seed)
    fresh = iter(range(1, 100_000))
    return [
        example(
            [next(fresh) for _ in range(draw.randint(1, 9))],
            *[[next(fresh) for _ in range(draw.randint(1, 7))] for _ in range(draw.randint(1, 4))],
        )
        for _ in range(count)
    ]


def test_trees_in_one_row_by_hand():
    batch = pack([PAIR, ONE], row_length=11)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 0]]
    assert batch.tree.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, -1]]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 2, 0, 1, 1, 1, 0]]
    assert batch.predict_index.tolist() == [2, 3, 2, 6, 7, 8]
    assert batch.token_index.tolist() == [3, 4, 5, 7, 8, 9]
    assert batch.target_ids.tolist() == [8, 9, 10, 12, 13, 14]
    assert batch.completion_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.offset.tolist() == [0, 1, 0, 0, 1, 2]
    assert batch.lengths.tolist() == [2, 1, 3]
    assert batch.last_index.tolist() == [4, 5, 9]
    assert (batch.num_completions, batch.num_tokens, batch.active_tokens) == (3, 6, 10)
    # Prompt 1 + 2 + 3, first completion 4 + 5, second 4; the other tree 1 + 2 + 3 + 4.
    assert batch.context_tokens == 19 + 10


def test_trees_in_rows_of_the_longest_tree_by_hand():
    batch = pack([ONE, PAIR])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, PAD, PAD]]
    # Completions keep the order of the examples, though the longer tree stands first.
    assert batch.lengths.tolist() == [3, 2, 1]
    assert batch.target_ids.tolist() == [12, 13, 14, 8, 9, 10]
    assert batch.predict_index.tolist() == [6, 7, 8, 2, 3, 2]
    assert batch.last_index.tolist() == [9, 4, 5]
    assert (batch.active_tokens, batch.context_tokens) == (10, 29)


def test_one_flat_row_by_hand():
    batch = pack([ONE, PAIR], layout="flat", flat_from=0)
    assert batch.layout == "flat" and batch.trees == ((1, (3,)), (3, (2, 1)))
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 5, 6, 7, 8, 9, 10]]  # in the order of the examples
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 3]]
    assert batch.tree.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch.branch.tolist() == [[0, 1, 1, 1, 0, 0, 0, 1, 1, 2]]
    assert batch.predict_index.tolist() == [0, 1, 2, 6, 7, 6]
    assert batch.token_index.tolist() == [1, 2, 3, 7, 8, 9]
    assert batch.target_ids.tolist() == [12, 13, 14, 8, 9, 10]
    assert batch.last_index.tolist() == [3, 8, 9]
    assert (batch.active_tokens, batch.context_tokens) == (10, 10 + 19)


def test_trees_that_are_all_short_are_not_laid_out_flat():
    prompt = [1] * (FLAT_FROM - 3)
    shorter, longer = example(prompt, [2], [3]), example(prompt, [2], [3, 4])
    assert pack([ONE, shorter], layout="flat").layout == "trees"
    assert pack([ONE, shorter], layout="flat").trees == ()
    assert pack([ONE, longer], layout="flat").layout == "flat"
    assert pack([longer], layout="flat", flat_from=FLAT_FROM + 1).layout == "trees"
    assert pack([longer], layout="trees").layout == "trees"
    assert pack([longer], layout="rows", flat_from=0).layout == "rows"


def test_who_reads_what():
    batches = {layout: pack([PAIR], layout=layout, flat_from=0) for layout in LAYOUTS}
    read = {reader: {layout for layout in LAYOUTS if reads(reader, batches[layout])} for reader in LAYOUTS}
    assert read == {"rows": {"rows"}, "trees": {"rows", "trees"}, "flat": {"rows", "trees", "flat"}}
    assert not any(reads(layout, None) for layout in LAYOUTS)
    assert common_layout("flat") == common_layout("flat", "flat") == "flat"
    assert common_layout("flat", "trees") == common_layout("trees", "flat") == "trees"
    assert common_layout("flat", "rows", "trees") == "rows"


def test_plain_rows_by_hand():
    batch = pack([PAIR, ONE], layout="rows")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 10, PAD], [11, 12, 13, 14, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 3, 0]]
    assert batch.tree.tolist() == [[0] * 5, [0, 0, 0, 0, -1], [0, 0, 0, 0, -1]]
    assert batch.predict_index.tolist() == [2, 3, 7, 10, 11, 12]
    assert batch.last_index.tolist() == [4, 8, 13]
    assert (batch.active_tokens, batch.context_tokens) == (13, 15 + 10 + 10)


def test_tokens_spread_and_sum_by_completion():
    batch = pack([PAIR, ONE])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert batch.per_completion(values).tolist() == [3.0, 3.0, 15.0]
    assert batch.padded(values).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert batch.padded(values, 4).tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 0]]
    assert batch.mask().tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert batch.mask(4)[:, 3].tolist() == [False] * 3


def test_gradients_flow_through_sums_and_spreading():
    batch = pack([PAIR, ONE])
    values = torch.zeros(6, requires_grad=True)
    (batch.per_completion(values) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [1, 1, 2, 3, 3, 3]


def check(batch: PackedBatch, examples: list[Example]) -> None:
    """Every completion can be read back, each token's predecessor is right, and positions continue the prompt's."""
    ids, positions = batch.input_ids.view(-1).tolist(), batch.position_ids.view(-1).tolist()
    completions = [(e.prompt_ids, c) for e in examples for c in e.completions]
    assert batch.num_completions == len(completions)
    for number, (prompt, completion) in enumerate(completions):
        mine = (batch.completion_index == number).nonzero().squeeze(-1)
        assert batch.offset[mine].tolist() == list(range(len(completion)))
        assert batch.target_ids[mine].tolist() == completion
        tokens, before = batch.token_index[mine].tolist(), batch.predict_index[mine].tolist()
        assert [ids[i] for i in tokens] == completion
        assert [ids[i] for i in before] == [prompt[-1], *completion[:-1]]
        assert [positions[i] for i in tokens] == list(range(len(prompt), len(prompt) + len(completion)))
        assert batch.last_index[number].item() == tokens[-1]
        assert batch.lengths[number].item() == len(completion)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_length", [None, 1, 64, 500])
def test_everything_can_be_read_back(layout, row_length):
    examples = many()
    batch = pack(examples, layout=layout, row_length=row_length, flat_from=0)
    check(batch, examples)
    longest = max(tree_length(e) for e in examples)
    if layout == "trees":
        assert batch.input_ids.shape[1] == max(longest, row_length or 0)
    if layout == "flat":
        assert batch.input_ids.shape == (1, batch.active_tokens) and batch.tree.unique_consecutive().numel() == 40
        assert batch.trees == tuple((len(e.prompt_ids), tuple(map(len, e.completions))) for e in examples)
    if layout != "rows":
        assert batch.active_tokens == sum(tree_length(e) for e in examples)
    assert batch.active_tokens == (batch.tree >= 0).sum().item()
    assert (batch.input_ids[batch.tree < 0] == PAD).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_context_tokens_equal_the_count_of_visible_pairs(layout):
    examples = many(12)
    total = 0
    for e in examples:
        prompt = len(e.prompt_ids)
        prompts = len(e.completions) if layout == "rows" else 1
        total += prompts * prompt * (prompt + 1) // 2
        total += sum(prompt + k + 1 for c in e.completions for k in range(len(c)))
    assert pack(examples, layout=layout, row_length=64, flat_from=0).context_tokens == total
    assert pack(examples, layout=layout, flat_from=0).context_tokens == total


def test_index_vectors_select_the_same_tokens_in_every_layout():
    examples = many()
    rows, *others = (pack(examples, layout=layout, row_length=64, flat_from=0) for layout in LAYOUTS)
    for batch in others:
        for name in ("predict_index", "token_index", "last_index"):
            for field in ("input_ids", "position_ids"):
                found, expected = (getattr(b, field).view(-1)[getattr(b, name)] for b in (batch, rows))
                assert torch.equal(found, expected)
        for name in ("target_ids", "completion_index", "offset", "lengths"):
            assert torch.equal(getattr(batch, name), getattr(rows, name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_examples_orders_the_completions_and_nothing_else(layout):
    examples = many(15)
    order = list(range(15))
    random.Random(1).shuffle(order)
    shuffled = [examples[i] for i in order]
    check(pack(shuffled, layout=layout, row_length=50, flat_from=0), shuffled)


def test_packing_is_deterministic_and_leaves_little_padding():
    examples = many(300)
    one, other = (pack(examples, row_length=128) for _ in range(2))
    assert torch.equal(one.input_ids, other.input_ids)
    assert one.active_tokens / one.input_ids.numel() > 0.95


def test_micro_batches_hold_every_example_once_with_similar_lengths():
    examples = many(23)
    groups = micro_batches(examples, 5)
    assert [len(group) for group in groups] == [5, 5, 5, 5, 3]
    assert sorted(i for group in groups for i in group) == list(range(23))
    lengths = [tree_length(examples[i]) for group in groups for i in group]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("bad", [example([], [1]), example([1]), example([1], [2], [])])
def test_what_has_no_tokens_is_refused_with_its_place(bad):
    with pytest.raises(ValueError, match="row 1"):
        pack([ONE, bad])


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = pack([PAIR], layout="flat", flat_from=0)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.last_index.device.type == "meta"
    assert (moved.layout, moved.context_tokens) == (batch.layout, batch.context_tokens)
    assert moved.trees == batch.trees == ((3, (2, 1)),)


def of_length(*lengths: int) -> list[Example]:
    return [Example([5] * (n - 1), [[6]], [True], str(n), "row") for n in lengths]


def test_micro_batches_hold_so_many_tokens_at_most():
    examples = of_length(4, 9, 3, 12, 4, 2)
    assert micro_batches(examples, 6) == [[3, 1, 0, 4, 2, 5]]
    assert micro_batches(examples, 6, 10) == [[3], [1], [0, 4], [2, 5]]  # 12 alone is more than 10
    assert micro_batches(examples, 6, 13) == [[3], [1, 0], [4, 2, 5]]
    assert micro_batches(examples, 2, 13) == [[3], [1, 0], [4, 2], [5]]
    assert micro_batches(examples, 6, 34) == [[3, 1, 0, 4, 2, 5]]
    assert micro_batches([], 6, 10) == []


def test_neighbours_with_one_prompt_become_one_tree():
    rows = [([1, 2], [3]), ([1, 2], [4, 5]), ([1], [6]), ([1, 2], [7])]
    examples = [Example(prompt, [ids], [n != 1], "k", f"row {n}") for n, (prompt, ids) in enumerate(rows)]
    merged = merge_prompts(examples)
    assert [(e.prompt_ids, e.completions, e.ended) for e in merged] == [
        ([1, 2], [[3], [4, 5]], [True, False]),
        ([1], [[6]], [True]),
        ([1, 2], [[7]], [True]),
    ]
    one, other = pack(merged), pack(examples)
    assert torch.equal(one.target_ids, other.target_ids) and torch.equal(one.lengths, other.lengths)
    assert (one.active_tokens, other.active_tokens) == (2 + 3 + 1 + 1 + 2 + 1, 2 + 3 + 1 + 1 + 2 + 1 + 2)
    assert (one.num_predicting, other.num_predicting) == (4, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_vectors_leave_out_tokens_that_are_not_trained(layout):
    turns = example([5, 6], [7, 8, 9, 10])
    turns.trained = [True, False, False, True]
    batch = pack([ONE, turns, PAIR], layout=layout, flat_from=1)
    assert batch.target_ids.tolist() == [12, 13, 14, 7, 10, 8, 9, 10]
    ids = batch.input_ids.view(-1)
    assert ids[batch.token_index].tolist() == batch.target_ids.tolist()
    assert ids[batch.predict_index].tolist() == [11, 12, 13, 6, 9, 7, 8, 7]
    assert batch.completion_index.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert batch.lengths.tolist() == [3, 4, 2, 1]
    assert ids[batch.last_index].tolist() == [14, 10, 9, 10]
    assert batch.num_tokens == 8 and turns.tokens_trained == 2
