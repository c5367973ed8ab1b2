"""Distinct n-grams and self-BLEU by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_pipeline.evaluation.diversity import distinct, self_bleu, token_budget


def test_n_grams_lie_within_one_response():
    # 1-grams 1 2 1 2 | 1 2: 2 of 6. 2-grams 12 21 12 | 12: 2 of 4. 4-grams 1212: 1 of 1.
    found = distinct([[1, 2, 1, 2], [1, 2]], 6)
    assert found == {"distinct_1": 2 / 6, "distinct_2": 2 / 4, "distinct_4": 1.0, "tokens": 6}
    assert distinct([[1, 2], [3, 4]], 4, orders=(2, 3)) == {"distinct_2": 1.0, "distinct_3": 0.0, "tokens": 4}


def test_the_budget_is_kept_and_cuts_the_last_response():
    responses = [[k] * 5 for k in range(20)]
    found = distinct(responses, 12, orders=(1, 2))
    assert found == {"distinct_1": 3 / 12, "distinct_2": 3 / 9, "tokens": 12}  # 5 + 5 + 2 tokens of three responses
    assert distinct(responses, 100)["distinct_1"] == 20 / 100
    assert distinct([[], [1], []], 1)["distinct_1"] == 1.0


def test_the_order_is_shuffled_and_fixed():
    responses = [[k] for k in range(10)] + [[0]] * 90
    # In the order given the first ten tokens would all differ.
    assert distinct(responses, 10)["distinct_1"] < 0.6
    assert distinct(responses, 10) == distinct(responses, 10)
    found = {distinct(responses, 10, seed=seed)["distinct_1"] for seed in range(10)}
    assert len(found) > 1


def test_the_budget_that_all_arms_have():
    arms = [[[1, 2], [3]], [[1] * 10], [[1], [2]]]
    assert token_budget(arms) == 2
    for budget in (0, 4):
        with pytest.raises(ValueError, match="found 3 tokens in 2 responses"):
            distinct(arms[0], budget)


def test_bleu_by_hand():
    # "a b c d e" against "a b c x e": 4/5, 2/4, 1/3 and no 4-gram of 2, smoothed to 1 / (2 x 2); equal lengths.
    expected = (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** (1 / 4)
    assert self_bleu([["a b c d e", "a b c x e"]]) == pytest.approx(expected, abs=1e-6)


def test_a_short_response_uses_the_n_grams_it_has_and_pays_for_brevity():
    # "a b" against "a b c": all of 2 and 1 n-grams match, brevity exp(1 - 3/2); the other: 2/3 and 1/2.
    one, other = math.exp(-0.5), None
    other = (2 / 3 * 1 / 2 * 1 / (2 * 1)) ** (1 / 3)  # one 3-gram, none found: smoothed to 1/2
    assert self_bleu([["a b", "a b c"]]) == pytest.approx((one + other) / 2, abs=1e-6)


def test_extremes():
    assert self_bleu([["the same words here", "the same words here"]]) == 1.0
    assert self_bleu([["one two three four", "five six seven eight"]]) == pytest.approx(0.0, abs=1e-12)
    assert self_bleu([["", ""]]) == 1.0
    assert self_bleu([["", "a b"]]) == 0.0


def test_each_response_counts_the_same_and_prompts_do_not_mix():
    # Three equal ones and, on another prompt, two that share nothing with each other but all with the first prompt.
    assert self_bleu([["a b c d"] * 3, ["a b c d", "w x y z"]]) == pytest.approx(3 / 5, abs=1e-12)
    # An equal one among three: 1, 1, and 0 for the odd one.
    assert self_bleu([["a b c d", "a b c d", "w x y z"]]) == pytest.approx(2 / 3, abs=1e-12)


@pytest.mark.parametrize("responses", [[], [["a"]], [["a", "b"], ["c"]]])
def test_a_response_without_company_is_refused(responses):
    with pytest.raises(ValueError, match="fewer than two"):
        self_bleu(responses)
