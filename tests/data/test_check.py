from __future__ import annotations

from rlhf_pipeline.data.check import check_source, preview

ROWS = [
    {"prompt": "a", "chosen": "bb", "rejected": "c", "split": "train"},
    {"prompt": "a", "chosen": "b", "rejected": "cc", "split": "test", "label_probability": 0.5},
    {"prompt": "ab", "chosen": "bbb", "rejected": "dda", "rejected_ended": False, "split": "train"},
    {"prompt": "ab", "chosen": "b", "rejected": "b", "split": "train"},
    {"prompt": "aaa", "chosen": None, "rejected": None, "split": "train"},
]


def test_a_source_is_described(jsonl):
    found = check_source(jsonl(*ROWS))
    expected = {
        "format": "pair",
        "rows": 5,
        "usable": 3,
        "kinds": {"pair": 3},
        "faulty_rows": 2,
        "faults": {"identical_pair": 1, "null": 1},
        "ties": 2,
        "duplicate_prompts": 1,
        "duplicate_rows": 0,
        "not_ended": 1,
        "splits_from": "source",
        "splits": {"train": 2, "test": 1},
        "prompt_overlap": {"test/train": 1},
        "length_unit": "characters",
        "longer_wins": 0.5,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["lengths"]["prompt"] == {"median": 1, "p95": 2, "max": 2}
    assert found["lengths"]["rejected"] == {"median": 2, "p95": 3, "max": 3}
    assert len(found["fault_list"]) == 3


def test_lengths_are_in_tokens_with_a_tokenizer_or_ids(jsonl, letters):
    source = jsonl({"prompt": "a", "completion": "bcbc"}, {"prompt": "ad", "completion": "d"})
    found = check_source(source, tokenizer=letters)
    assert (found["length_unit"], found["lengths"]["completion"]["max"]) == ("tokens", 2)
    assert found["longer_wins"] is None
    row = {"prompt": "a", "completion": "b", "prompt_ids": [1, 2, 3], "completion_ids": [4]}
    assert check_source(jsonl(row))["lengths"]["prompt"]["max"] == 3


def test_ties_of_rankings_are_counted(jsonl):
    row = {"prompt": "a", "completions": ["b", "cc", "ddd"], "scores": [1, 1, 0]}
    found = check_source(jsonl(row))
    assert (found["ties"], found["longer_wins"]) == (1, 0.0)


def test_a_preview_shows_records_as_they_were_understood(jsonl):
    first, second = preview(jsonl(*ROWS), 2)
    assert first["where"].endswith(":1")
    assert {name: second[name] for name in ("kind", "split", "prompt", "completions", "label_probability")} == {
        "kind": "pair",
        "split": "test",
        "prompt": "a",
        "completions": ["b", "cc"],
        "label_probability": 0.5,
    }
