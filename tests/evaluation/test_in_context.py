"""In-context DPO as functions: BM25, copies and choices by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.in_context import bm25, choose, cosines, is_copy, nearest, words


def test_bm25_by_hand():
    documents = [["a", "b"], ["a"], ["b", "b", "c"]]  # N = 3, mean length 2; k1 = 1.5, b = .75
    found = list(bm25([["a"], ["b"], ["c", "c", "z"], ["a", "c"], []], documents))
    # idf(a) = idf(b) = log(1 + 1.5 / 2.5) = log 1.6, idf(c) = log(1 + 2.5 / 1.5) = log 8/3
    # length norm 1.5 (.25 + .75 |d| / 2): 1.5, .9375, 2.0625
    a, c = np.log(1.6), np.log(8 / 3)
    one = [a * 2.5 / 2.5, a * 2.5 / 1.9375, 0.0]
    np.testing.assert_allclose(found[0], one, atol=1e-12)
    np.testing.assert_allclose(found[1], [a * 2.5 / 2.5, 0.0, a * 2 * 2.5 / 4.0625], atol=1e-12)
    np.testing.assert_allclose(found[2], [0.0, 0.0, c * 2.5 / 3.0625], atol=1e-12)  # a term counts once; z is unknown
    np.testing.assert_allclose(found[3], [*one[:2], c * 2.5 / 3.0625], atol=1e-12)
    np.testing.assert_allclose(found[0][:2], [0.470004, 0.606457], atol=1e-6)
    assert found[4].tolist() == [0, 0, 0]


def test_cosines_by_hand():
    documents = np.array([[3.0, 4.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    first, second = cosines(np.array([[1.0, 0.0], [0.0, 10.0]]), documents)
    np.testing.assert_allclose(first, [0.6, 1, -1, 0], atol=1e-15)
    np.testing.assert_allclose(second, [0.8, 0, 0, 0], atol=1e-15)
    assert nearest(first, 2) == [0, 1]


def test_the_nearest_document_is_the_last():
    assert nearest(np.array([0.0, 3.0, 1.0, 3.0, 2.0]), 3) == [4, 3, 1]
    assert nearest(np.array([1.0, -np.inf, 1.0 + 1e-15]), 2) == [2, 0]


def test_words():
    assert words("The plot, of\nthis DRAMA's: was") == ["the", "plot", "of", "this", "drama", "s", "was"]


@pytest.mark.parametrize(
    ("response", "others", "expected"),
    [
        (range(10), [range(10)], True),
        (range(10), [[5], range(10)], True),
        (range(10), [[*range(9), 99]], True),  # 2 x 9 / 20 = .9
        (range(10), [[*range(8), 98, 99]], False),  # .8
        (range(10), [range(20)], False),  # 2 x 10 / 30
        (range(10), [range(9, -1, -1)], False),
        ([1, 2, 3], [[1, 2, 4]], False),
        ([], [[]], True),
        ([], [[1]], False),
        ([1], [], False),
    ],
)
def test_a_copy_is_equal_or_nearly_equal(response, others, expected):
    assert is_copy(list(response), [list(one) for one in others]) is expected


def test_the_best_that_is_no_copy_is_chosen():
    scores = np.array([[[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]], [[-5.0, -6.0, -5.0], [0.0, 1.0, 2.0]]])
    copies = np.array([[[False] * 3, [False, True, False]], [[False] * 3, [True] * 3]])
    assert choose(scores, copies).tolist() == [[1, 2], [0, 0]]
