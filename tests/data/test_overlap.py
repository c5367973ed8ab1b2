from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.overlap import duplicates, keep_apart, leaks, loose, shared_prompts
from rlhf_pipeline.errors import DataError
from rlhf_pipeline.stages.data import StageData


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("How are you?", "how are  you"),
        ("\n\nHuman: hi\n\nAssistant:", "human hi assistant"),
        ("It's “fine”, really!", "its fine really"),
        ("(see [1])", "see 1"),
        ("cafe\u0301", "CAFÉ"),
        ("STRASSE", "straße"),
    ],
)
def test_texts_that_say_the_same(first, second):
    assert loose(first) == loose(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [("3+4", "3-4"), ("3.5", "35"), ("10:30", "1030"), ("a b", "ab"), ("???", "!"), ("x < y", "x > y"), ("a", "b")],
)
def test_texts_that_do_not(first, second):
    assert loose(first) != loose(second)


def test_the_reason_is_the_strongest_and_both_rows_are_named(pair):
    train = [pair("a?", where="f:1"), pair("b", where="f:2"), pair("b", chosen="d", where="f:3")]
    held_out = [
        pair("b", chosen="d", where="f:4"),  # the third row
        pair("b", chosen="e", where="f:5"),
        pair("A", where="f:6"),
        pair("c", where="f:7"),
    ]
    faults = leaks([*train, *held_out], ["train"] * 3 + ["test"] * 4, "train", {"test"})
    assert [(item.fault.where, item.reason) for item in faults] == [
        ("f:4", "leaked_row"),
        ("f:5", "leaked_prompt"),
        ("f:6", "leaked_similar_prompt"),
    ]
    found = [item.fault.found for item in faults]
    assert found[0].endswith("this row of split 'test' is also in split 'train', f:3")
    assert found[1].endswith("its prompt of split 'test' is also in split 'train', f:2")
    assert found[2].endswith("f:1")
    assert leaks([*train, *held_out], ["train"] * 7, "train", {"test"}) == []
    assert leaks(train, ["train", "judge", "other"], "train", {"test"}) == []


ROWS = [
    {"prompt": "a b", "chosen": "c", "rejected": "d", "split": "train"},
    {"prompt": "a b", "chosen": "cc", "rejected": "d", "split": "train"},
    {"prompt": "a b.", "chosen": "c", "rejected": "d", "split": "test"},
    {"prompt": "d", "chosen": "c", "rejected": "d", "split": "test"},
    {"prompt": "d", "chosen": "a", "rejected": "d", "split": "judge"},
]


def apart(source: str, train: str = "train", test: str = "test", *, skip: bool = False, allow: bool = False):
    splits = {"dataset_train_split": train, "dataset_test_split": test}
    return keep_apart(read_records(source), SimpleNamespace(**splits, skip_bad_rows=skip, allow_overlap=allow))


def test_overlap_is_refused_left_out_or_allowed(jsonl):
    source = jsonl(*ROWS)
    with pytest.raises(DataError) as caught:
        apart(source)
    summary, fault = caught.value.faults
    assert "1 of 2 rows of the evaluation splits are also in split 'train' (leaked_similar_prompt 1)" in str(summary)
    assert "skip_bad_rows" in str(summary) and "allow_overlap" in str(summary)
    assert fault.where.endswith("rows.jsonl:3") and fault.found.endswith("rows.jsonl:1")
    left = apart(source, skip=True)
    assert [record.where.rpartition(":")[2] for record in left.records] == ["1", "2", "4", "5"]
    assert [item.reason for item in left.faults] == ["leaked_similar_prompt"]
    assert len(apart(source, allow=True).records) == 5


def test_a_source_without_a_new_row_to_evaluate_on_is_refused(jsonl):
    # What is left would name one split only, and be split anew by the hash of the prompt.
    with pytest.raises(DataError, match="no row of its evaluation splits is new"):
        apart(jsonl(*ROWS[:3]), skip=True)


def test_only_the_splits_that_are_used_are_looked_at(jsonl):
    source = jsonl(*ROWS)
    assert len(apart(source, "judge", "validation", skip=True).records) == 4  # test shares "d" with judge
    assert len(apart(source, "all").records) == 5
    other = jsonl(*({**row, "split": f"{row['split']}_prefs"} for row in ROWS))
    assert len(apart(other).records) == 5  # nobody is asked for these splits
    with pytest.raises(DataError, match="leaked_similar_prompt"):
        apart(other, "train_prefs", "test_prefs")


def test_splits_by_the_hash_of_the_prompt_are_left_alone(jsonl):
    source = jsonl(*({key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS))
    assert len(apart(source).records) == 5
    assert len(apart("world:verdicts").records) == 36_000


def test_a_stage_refuses_overlap_in_a_mixture_too(jsonl, letters):
    values = {
        "model_name_or_path": "x",
        "output_name": "x",
        "max_prompt_length": 8,
        "response_length": 4,
        "datasets": [{"dataset_name": jsonl(*ROWS)}],
    }
    with pytest.raises(DataError, match=r"rows\.jsonl:3: leaked_similar_prompt"):
        StageData(load_config("dpo", None, extra=values).config, None, print).split("pair", "train", letters)
    values["skip_bad_rows"] = True
    config = load_config("dpo", None, extra=values).config
    examples, (report,) = StageData(config, None, lambda _: None).split("pair", "test", letters)
    assert [example.prompt_text for example in examples] == ["d"]
    assert report.dropped == {"leaked_similar_prompt": 1}


def test_duplicates_and_shared_prompts_are_counted(pair):
    records = [pair("a b"), pair("a b"), pair("A  b!"), pair("a b", chosen="d"), pair("c")]
    assert duplicates(records) == {"duplicate_rows": 1, "similar_rows": 1}
    splits = ["train", "test", "test", "judge", "judge"]
    assert shared_prompts(records, splits) == {"judge/test": 1, "judge/train": 1, "test/train": 1}
    assert shared_prompts(records[2:], ["train", "test", "test"]) == {"test/train": 0}
    assert shared_prompts(records[2:], ["train", "test", "test"], near=True) == {"test/train": 1}


def test_a_saved_data_set_is_named_by_split_and_row(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved\[test\]:1: leaked_row: .*saved\[train\]:1"):
        apart(str(tmp_path / "saved"))


def test_messages_are_compared_by_what_they_say(jsonl):
    turns = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "yes"}]
    other = [{"role": "user", "content": "hi there!"}, {"role": "assistant", "content": "no"}]
    source = jsonl({"messages": turns, "split": "train"}, {"messages": other, "split": "test"})
    with pytest.raises(DataError, match="leaked_similar_prompt"):
        apart(source)
