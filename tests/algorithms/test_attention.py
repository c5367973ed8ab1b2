"""Attention within trees, against a dense softmax whose mask is built here from its definition."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rlhf_pipeline.algorithms import attention
from rlhf_pipeline.algorithms.attention import attention_plan, tree_attention

EXACT = {"rtol": 0, "atol": 1e-12}
# WHOLE, QUERIES: small trees take every branch of the plan.
BRANCHES = {
    "as shipped": (attention.WHOLE, attention.QUERIES),
    "some trees whole, others in blocks": (12, 4),
    "every completion one block": (0, 1000),
    "blocks of 3": (0, 3),
    "blocks of 1": (0, 1),
}
TREES = (
    (5, (7,)),  # K = 1
    (4, (3, 6)),  # K = 2
    (3, (1, 2, 5, 1, 4, 3, 1, 2, 6)),  # K = 9
    (1, (1,)),
    (1, (1, 1, 1)),
    (6, ()),  # a prompt alone
    (2, (9, 8)),
)
TOKENS = 12 + 13 + 28 + 2 + 4 + 6 + 19


@pytest.fixture(params=BRANCHES)
def branch(request, monkeypatch):
    whole, queries = BRANCHES[request.param]
    monkeypatch.setattr(attention, "WHOLE", whole)
    monkeypatch.setattr(attention, "QUERIES", queries)
    return request.param


def sees(trees, window=None) -> torch.Tensor:
    """(T, T) bool: query q sees key k of its own tree, in the prompt or in its own completion, of a position that is
    not later and less than `window` before."""
    places = []
    for tree, (prompt, completions) in enumerate(trees):
        places += [(tree, 0, position) for position in range(prompt)]
        for number, count in enumerate(completions, 1):
            places += [(tree, number, prompt + step) for step in range(count)]
    tree, segment, position = torch.tensor(places).T
    before = position[:, None] - position
    mine = (segment == 0) | (segment == segment[:, None])
    return (tree == tree[:, None]) & mine & (before >= 0) & (before < (window or len(places)))


def dense(query, key, value, trees, window=None, scale=1.0) -> torch.Tensor:
    """softmax(scale Q K^T + M) V with a mask of T x T, head by head."""
    groups, seen = len(query) // len(key), sees(trees, window)
    heads = []
    for head, queries in enumerate(query):
        scores = (scale * queries @ key[head // groups].T).masked_fill(~seen, -math.inf)
        heads.append(torch.softmax(scores, -1) @ value[head // groups])
    return torch.stack(heads)


def states(tokens=TOKENS, heads=2, key_heads=2, size=4, value_size=3, seed=0, dtype=torch.float64):
    """Random queries, keys and values as a model hands them over: (T, H, D) with the first two axes exchanged."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (heads, size), (key_heads, size), (key_heads, value_size)
    drawn = [torch.randn(tokens, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    return [each.transpose(0, 1).requires_grad_() for each in drawn]


def run(query, key, value, trees=TREES, window=None, scale=1.0):
    plan = attention_plan(trees, window=window, dtype=torch.promote_types(value.dtype, torch.float32))
    return tree_attention(query, key, value, plan, scale=scale)


def saving(function, *arguments):
    """What a function returns, and the sizes of the tensors that it keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        return function(*arguments), sizes


def gradients(output, inputs, seed=1):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)


def test_the_mask_of_these_tests_by_hand():
    found = sees(((2, (2, 1)), (1, (1,)))).int().tolist()
    assert found == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],  # the second completion does not see the first
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    # Positions 0, 1, 2, 3 and 2: with a window of 2 the second completion's token sees the prompt's last one.
    assert sees(((2, (2, 1)),), 2).int().tolist()[2:] == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_queries_of_0_average_what_they_see_by_hand(branch):
    values = torch.tensor([[[2.0], [4.0], [6.0], [8.0], [12.0]]], dtype=torch.float64)
    zeros = torch.zeros(1, 5, 3, dtype=torch.float64)
    trees = ((2, (2, 1)),)
    assert run(zeros, zeros, values, trees)[0, :, 0].tolist() == pytest.approx([2, 3, 4, 5, 6], abs=1e-14)
    found = run(zeros, zeros, values, trees, window=2)
    assert found[0, :, 0].tolist() == pytest.approx([2, 3, 5, 7, 8], abs=1e-14)
    assert torch.equal(run(zeros, zeros, values, trees, window=1), values)
    values.requires_grad_()
    run(zeros, zeros, values, trees).sum().backward()  # how much each is seen
    assert values.grad.flatten().tolist() == pytest.approx([29 / 12, 17 / 12, 7 / 12, 1 / 4, 1 / 3], abs=1e-14)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 8, 100])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_output_and_gradients_are_those_of_a_dense_softmax(branch, groups, window):
    inputs = states(heads=2 * groups)
    found, expected = run(*inputs, window=window, scale=0.7), dense(*inputs, TREES, window, 0.7)
    assert found.shape == (2 * groups, TOKENS, 3)
    torch.testing.assert_close(found, expected, **EXACT)
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, inputs)):
        assert theirs.abs().max() > 0.1 or window == 1
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("window", [None, 1, 5, 150, 190, 10_000])
def test_long_trees_as_shipped(window):
    """Trees of one token less, as many and one token more than are scored whole, and one of several blocks."""
    whole, queries = attention.WHOLE, attention.QUERIES
    trees = ((7, (whole - 8 - 5, 5)), (100, (whole - 100 - 3, 2, 1)), (9, (whole - 9, 1)), (queries + 9, (queries, 2)))
    assert [prompt + sum(rest) - whole for prompt, rest in trees[:3]] == [-1, 0, 1]
    inputs = states(sum(prompt + sum(rest) for prompt, rest in trees), heads=2, key_heads=1)
    found, expected = run(*inputs, trees, window, 0.5), dense(*inputs, trees, window, 0.5)
    torch.testing.assert_close(found, expected, **EXACT)
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_random_trees(branch):
    draw = random.Random(3)
    for seed in range(8):
        trees = [
            (draw.randint(1, 9), tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 5))))
            for _ in range(draw.randint(1, 4))
        ]
        window = draw.choice([None, draw.randint(1, 18)])
        inputs = states(sum(prompt + sum(rest) for prompt, rest in trees), seed=seed)
        torch.testing.assert_close(run(*inputs, trees, window), dense(*inputs, trees, window), **EXACT)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_by_finite_differences(branch, groups, window):
    trees = ((3, (2, 4)), (1, (1, 1, 1)), (2, (4,)))
    inputs = states(19, heads=groups, key_heads=1, size=2, value_size=3)
    plan = attention_plan(trees, window=window, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, plan, scale=0.8), inputs)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (1, 2)])
def test_only_some_of_the_inputs_need_gradients(branch, moving):
    inputs = [each.detach() for each in states(heads=4)]
    for place in moving:
        inputs[place].requires_grad_()
    mine = gradients(run(*inputs), [inputs[place] for place in moving])
    theirs = gradients(dense(*inputs, TREES), [inputs[place] for place in moving])
    for found, expected in zip(mine, theirs):
        torch.testing.assert_close(found, expected, **EXACT)


def test_attention_is_kept_up_to_its_limit_and_else_computed_again(branch, monkeypatch):
    inputs, computed, results = states(heads=4), [], {}
    original = attention._probabilities

    def counted(block, *rest):
        found = original(block, *rest)
        computed.append(found.numel())
        return found

    monkeypatch.setattr(attention, "_probabilities", counted)
    number = len(attention_plan(TREES))
    copies = inputs[0].numel()
    for limit in (0, 0.5, 2, 1e9):
        monkeypatch.setattr(attention, "KEPT", limit)
        computed.clear()
        output, saved = saving(run, *inputs)
        results[limit] = gradients(output, inputs)
        # What is saved beside queries, keys and values.
        attended = sum(saved) - copies - inputs[1].numel() - inputs[2].numel()
        kept = 2 * number - len(computed)
        assert attended == sum(computed[:kept]) <= limit * copies
        assert kept == {0: 0, 1e9: number}.get(limit, kept)
        if limit == 0.5 and number > 20:
            assert 0 < kept < number
    for found in results.values():
        assert all(map(torch.equal, found, results[0]))


def test_nothing_is_kept_without_gradients(branch):
    with torch.no_grad():
        plain = run(*states())
    assert not plain.requires_grad and torch.equal(plain, run(*states()).detach())


@pytest.mark.parametrize("window", [None, 3])
def test_no_completion_reads_another_one(branch, window):
    trees, inputs = ((4, (3, 6, 2)), (3, (2, 2))), [each.detach() for each in states(22)]
    before = run(*inputs, trees, window)
    for first, end in ((4, 7), (7, 13), (13, 15), (18, 20), (20, 22)):
        changed = [each.clone() for each in inputs]
        for each in changed:
            each[:, first:end] += 3.0
        after = run(*changed, trees, window)
        others = [place for place in range(22) if not first <= place < end]
        assert torch.equal(after[:, others], before[:, others])
        assert (after[:, first:end] - before[:, first:end]).abs().amin((0, 2)).min() > 1e-3


def test_the_gradient_of_one_completion_stays_in_its_own_past(branch):
    trees, inputs = ((4, (3, 6, 2)), (3, (2, 4))), states(24)
    grads = torch.autograd.grad(run(*inputs, trees)[:, 7:13].square().sum(), inputs)
    for grad, own in zip(grads, (set(range(7, 13)), *[{*range(4), *range(7, 13)}] * 2)):
        reached = grad.abs().amax((0, 2)) > 0
        assert set(reached.nonzero().flatten().tolist()) <= own
    assert grads[2].abs().amax((0, 2))[[*range(4), *range(7, 13)]].min() > 0


@pytest.mark.parametrize("window", [None, 4])
def test_permuting_trees_permutes_the_output(branch, window):
    inputs = states()
    starts = [0]
    for prompt, completions in TREES:
        starts.append(starts[-1] + prompt + sum(completions))
    order = [3, 6, 0, 5, 2, 1, 4]
    places = [place for tree in order for place in range(starts[tree], starts[tree + 1])]
    found = run(*(each[:, places] for each in inputs), [TREES[tree] for tree in order], window)
    torch.testing.assert_close(found, run(*inputs, window=window)[:, places], **EXACT)


@pytest.mark.parametrize("window", [None, 4])
def test_permuting_completions_permutes_the_output(branch, window):
    inputs = states(4 + 5 + 2 + 3)
    places = [*range(4), *range(11, 14), *range(4, 9), *range(9, 11)]
    found = run(*(each[:, places] for each in inputs), ((4, (3, 5, 2)),), window)
    torch.testing.assert_close(found, run(*inputs, ((4, (5, 2, 3)),), window)[:, places], **EXACT)


def test_half_precision_is_computed_in_fp32(branch):
    inputs = states(heads=4, dtype=torch.bfloat16)
    found = run(*inputs, scale=0.5)
    wide = [each.detach().float().requires_grad_() for each in inputs]
    expected = run(*wide, scale=0.5)
    assert found.dtype == torch.bfloat16 and expected.dtype == torch.float32
    assert torch.equal(found, expected.bfloat16())
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, wide)):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=2e-2)


def test_autocast_changes_nothing(branch):
    inputs = states(dtype=torch.float32)
    expected = run(*inputs)
    theirs = gradients(expected, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(*inputs)
        mine = gradients(found, inputs)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert all(map(torch.equal, mine, theirs))


def test_large_scores_are_finite(branch):
    inputs = states(dtype=torch.float32)
    found = run(*inputs, scale=1e6)
    expected = dense(*(each.double() for each in inputs), TREES, scale=1e6).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all(grad.isfinite().all() for grad in gradients(found, inputs))
