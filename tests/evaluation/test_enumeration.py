"""All responses of a small tree, written out; and families of siblings against the general packing."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.evaluation.enumeration import ResponseTree, pack_siblings


def test_leaves_are_all_responses_once_the_ended_ones_first():
    tree = ResponseTree(vocabulary=3, stop_id=1, horizon=3)
    ended = [[*words, 1] for depth in range(3) for words in product((0, 2), repeat=depth)]
    cut = [list(words) for words in product((0, 2), repeat=3)]
    assert [tree.completion(leaf) for leaf in range(tree.num_leaves)] == ended + cut
    assert tree.ended.tolist() == [True] * 7 + [False] * 8
    assert tree.word_counts.tolist() == [0, 1, 1, 2, 2, 2, 2, *[3] * 8]
    assert (tree.num_ended, tree.num_leaves) == (7, 15)


def test_the_world_has_954305_responses_to_a_prompt():
    tree = ResponseTree(32, 1, 4)
    assert tree.num_leaves == 1 + 31 + 31**2 + 31**3 + 31**4 == 954_305
    assert tree.responses.shape == (954_305, 4)
    assert len(np.unique(tree.responses @ (33 ** np.arange(4)) * 5 + tree.word_counts)) == 954_305


def test_the_last_prefixes_are_numbered_like_their_leaves():
    tree = ResponseTree(4, 3, 2)
    assert tree.prefixes(0).shape == (1, 0)
    assert tree.prefixes(2).tolist() == [tree.completion(tree.num_ended + i) for i in range(9)]


def test_too_many_responses_are_refused_with_their_number():
    with pytest.raises(MismatchError, match=r"1,048,577 ended|5,000,000"):
        ResponseTree(32, 1, 5)


@pytest.mark.parametrize("layout", ["flat", "trees", "rows"])
def test_siblings_are_packed_as_the_general_packing_does(layout):
    prefixes, children = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 6, 9]]), torch.tensor([1, 0, 4, 2])
    examples = [
        Example(row, [[child] for child in children.tolist()], [True] * 4, str(row), "x") for row in prefixes.tolist()
    ]
    expected = pack(examples, layout=layout)
    found = pack_siblings(prefixes, children, layout)
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name
