from __future__ import annotations

import pytest

from rlhf_pipeline.data.records import Record
from rlhf_pipeline.experiment.data_quality import label_noise


def pairs(count: int, make) -> list[Record]:
    return [Record("pair", f"film {i}", make(i), (True, True)) for i in range(count)]


def test_labels_that_rules_predict_have_no_noise():
    found = label_noise(pairs(60, lambda i: ("a good long film", "a bad film")))
    assert (found["pairs"], found["prompts"]) == (60, 60)
    assert found["longer_wins"]["accuracy"] == found["tfidf"]["accuracy"] == 1
    assert found["noise_at_most"] == 0 and found["contradicted"] == 0 and "expected_noise" not in found


def test_words_are_learnt_on_other_prompts_only():
    # Each prompt has words of its own: what is learnt from the others says nothing of it.
    found = label_noise(pairs(60, lambda i: (f"yes{i}", f"noo{i}")))
    assert found["tfidf"]["accuracy"] == found["longer_wins"]["accuracy"] == 0.5
    assert found["noise_at_most"] == 0.5


def test_a_rule_that_is_always_wrong_is_as_good_as_one_that_is_right():
    found = label_noise(pairs(60, lambda i: ("fine", "not at all")))
    assert found["longer_wins"]["accuracy"] == 0
    assert found["noise_at_most"] == 0


def test_flipped_labels_bound_the_noise_from_above():
    # A fifth of the labels are flipped, the words are the same everywhere: no rule agrees with more than .8.
    texts = ("good", "bad"), ("bad", "good")
    found = label_noise(pairs(500, lambda i: texts[i % 5 == 0]))
    assert found["tfidf"]["accuracy"] == pytest.approx(0.8)
    assert 0.2 < found["noise_at_most"] < 0.25


def test_pairs_that_contradict_each_other_and_known_probabilities():
    records = [
        Record("pair", "a", ("x", "y"), (True, True), extra={"label_probability": 0.9}),
        Record("pair", "a", ("y", "x"), (True, True), extra={"label_probability": 0.6}),
        Record("pair", "b", ("y", "x"), (True, True), extra={"label_probability": 0.5}),
        Record("pair", "b", ("x", "x"), (True, False), extra={"label_probability": 0.7}),
    ]
    found = label_noise(records)
    assert found["contradicted"] == 2
    assert found["expected_noise"] == pytest.approx((0.1 + 0.4 + 0.5 + 0.3) / 4)


def test_rankings_are_their_untied_pairs_and_other_records_have_no_labels():
    ranking = Record("ranking", "a", ("x", "yy", "z"), (True,) * 3, extra={"ranks": (2, 1, 2)})
    found = label_noise([ranking])
    assert found["pairs"] == 2 and found["longer_wins"]["accuracy"] == 1
    tied = Record("ranking", "a", ("x", "y"), (True,) * 2, extra={"ranks": (1, 1)})
    assert label_noise([tied]) is None
    assert label_noise([Record("prompt", "a")]) is None
