from __future__ import annotations

import pytest

from rlhf_pipeline.data.records import Record
from rlhf_pipeline.evaluation.data_quality import findings, label_noise

SIZE = 60 * (60 / 60.5) * (0.5 / 60.5) / (0.5 * 60 / 60.5 / 59.5)
NONE_OF_60 = 1 - SIZE / (SIZE + 2.000995**2)
"""What 60 prompts without an exception leave possible: Wilson's end, half a prompt more, t(.975, 59)."""


def pairs(count: int, make) -> list[Record]:
    return [Record("pair", f"film {i}", make(i), (True, True)) for i in range(count)]


def test_labels_that_rules_predict_have_no_noise():
    found = label_noise(pairs(60, lambda i: ("a good long film", "a bad film")))
    assert (found["pairs"], found["prompts"]) == (60, 60)
    assert found["longer_wins"]["accuracy"] == found["tfidf"]["accuracy"] == 1
    assert found["noise_at_most"] == pytest.approx(NONE_OF_60, abs=1e-6)
    assert found["contradicted"] == 0 and "expected_noise" not in found


def test_words_are_learnt_on_other_prompts_only():
    # Each prompt has words of its own: what is learnt from the others says nothing of it.
    found = label_noise(pairs(60, lambda i: (f"yes{i}", f"noo{i}")))
    assert found["tfidf"]["accuracy"] == found["longer_wins"]["accuracy"] == 0.5
    assert found["noise_at_most"] == 0.5


def test_a_rule_that_is_always_wrong_is_as_good_as_one_that_is_right():
    found = label_noise(pairs(60, lambda i: ("fine", "not at all")))
    assert found["longer_wins"]["accuracy"] == 0
    assert found["noise_at_most"] == pytest.approx(NONE_OF_60, abs=1e-6)


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


def said(**changes) -> str:
    """The findings of a source without any, but for `changes`."""
    noise = changes.pop("noise", None)
    sure = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
    found = {
        "rows": 2000,
        "usable": 2000,
        "faulty_rows": 0,
        "faults": {},
        "unread_column": None,
        "labels": {},
        "margins": None,
        "notes": [],
        "leaked_rows": 0,
        "leaks": {},
        "similar_prompt_overlap": {"test/train": 0, "judge/train": 3},
        "duplicate_rows": 0,
        "duplicate_list": [],
        "splits": {"train": 1600, "judge": 200, "validation": 100, "test": 100},
        "split_prompts": {"train": 1600, "judge": 200, "validation": 100, "test": 100},
        "splits_from": "prompt hash",
        "kinds": {"pair": 2000},
        "label_noise": {"pairs": 2000, "contradicted": 0, "longer_wins": sure, "tfidf": sure, **(noise or {})},
    }
    return "\n".join(findings({**found, **changes}))


def rule(share: float) -> dict[str, float]:
    return {"accuracy": share, "accuracy_low": share - 0.05, "accuracy_high": share + 0.05}


def test_a_sound_source_is_told_its_splits_alone():
    (line,) = said().splitlines()
    assert line.startswith("rows of the splits: train 1600, judge 200, validation 100, test 100 (by the hash")


def test_rules_that_predict_labels_are_told_from_a_threshold_on():
    assert "length alone predicts 85% of the labels (the longer" in said(noise={"longer_wins": rule(0.85)})
    assert "length alone predicts 90% of the labels (the shorter" in said(noise={"longer_wins": rule(0.1)})
    assert "words alone" in said(noise={"tfidf": rule(0.65)})
    assert "alone" not in said(noise={"longer_wins": rule(0.64), "tfidf": rule(0.64)})
    assert "alone" not in said(noise={"longer_wins": rule(0.85), "pairs": 19})
    assert "alone" not in said(noise={"longer_wins": {"accuracy": 0.7, "accuracy_low": 0.4, "accuracy_high": 1.0}})


def test_prompts_without_a_finite_best_reward_are_told():
    text = said(win_graphs={"prompts": 240, "connected": 3})
    assert "3 of 240 prompts have labels with a finite best reward" in text and "when training stops" in text
    assert "finite" not in said(win_graphs={"prompts": 240, "connected": 240}) + said(win_graphs=None)


def test_margins_and_labels_are_told_with_what_reads_them():
    text = said(margins={"pairs": 1500, "min": -0.5, "mean": 0.75, "max": 2})
    assert "1500 of 2000 pairs have a margin, from -0.5 to 2, mean 0.75" in text
    assert "if `use_margin: true`, which moves the optimum" in text
    text = said(labels={"true": 5, "false": 3})
    assert "each row has a label (true 5, false 3): `rlhf dpo` with loss_type kto trains on such rows" in text


def test_faults_leakage_and_repeated_rows_are_told():
    lines = said(faulty_rows=2, faults={"null": 2}, leaked_rows=1, leaks={"leaked_row": 1}, unread_column="question")
    assert "2 of 2000 rows stop a stage (null 2)" in lines and "leakage: 1 rows" in lines
    assert "the column 'question' is not read; did you mean prompt?" in lines
    assert "leakage" in said(similar_prompt_overlap={"test/train": 1}) and "judge/" not in said()
    repeated = said(duplicate_rows=5, duplicate_list=["f:3 as f:1", "f:4 as f:1", "f:9 as f:2", "f:10 as f:2"])
    assert "5 of 2000 rows repeat an earlier one exactly: f:3 as f:1, f:4 as f:1, f:9 as f:2, ..." in repeated


def test_small_splits_are_told_with_what_to_expect_of_them():
    small = {
        "splits": {"train": 200, "judge": 21, "test": 16},
        "split_prompts": {"train": 200, "judge": 21, "test": 16},
    }
    lines = said(**small)
    assert "judge split: 21 pairs; a judge trained on so few" in lines and "raise split_fractions.judge" in lines
    # .5 / sqrt(16) = .125, and 1.96 times that .245
    assert "test split: 16 prompts" in lines and ".5/sqrt(16) = 0.12 and a 95 % interval of ±0.24" in lines
    assert "split_fractions" not in said(**small, splits_from="source")
    assert "judge split" not in said(**small, kinds={"demonstration": 237}, label_noise=None)
    assert "test split: no prompts" in said(splits={"train": 3}, split_prompts={"train": 3})
