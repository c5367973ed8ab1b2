from __future__ import annotations

import pytest

from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.splits import in_split, split_of
from rlhf_pipeline.errors import DataError


@pytest.mark.parametrize(
    ("prompt", "split"),
    [
        ("abc", "train"),  # SHA-256 begins ba78...: .728
        ("The quick brown fox jumps over the lazy dog", "judge"),  # d7a8...: .842
        ("", "validation"),  # e3b0...: .889
        ("message digest", "test"),  # f784...: .967
        ("  abc\n", "train"),
    ],
)
def test_the_split_follows_the_hash_of_the_prompt(prompt, split):
    assert split_of(prompt) == split


def test_fractions_move_the_borders_and_their_order_does_not():
    assert split_of("abc", {"test": 0.5, "train": 0.5}) == "test"
    assert split_of("message digest", {"train": 1.0, "judge": 0, "validation": 0, "test": 0}) == "train"
    assert split_of("abc", {"other": 0.5, "train": 0.5}) == "other"


def test_carried_splits_win_where_there_is_more_than_one():
    carried = [Record("prompt", "abc", split="test"), Record("prompt", "message digest", split="train")]
    assert in_split(carried, "train") == carried[1:]
    alone = [Record("prompt", "abc", split="test"), Record("prompt", "message digest", split="test")]
    assert in_split(alone, "train") == alone[:1]
    assert in_split(alone, "all") == alone


def test_splits_that_are_not_there_are_named():
    hashed = [Record("prompt", "abc")]
    with pytest.raises(DataError, match=r"f: no split 'tests'; expected one of train, .* did you mean 'test'"):
        in_split(hashed, "tests", source="f")
    with pytest.raises(DataError, match="split 'test' is empty"):
        in_split(hashed, "test")
    carried = [Record("prompt", "a", split="x"), Record("prompt", "b", split="y")]
    with pytest.raises(DataError, match="no split 'train'; expected one of the source's splits: x, y"):
        in_split(carried, "train")
    with pytest.raises(DataError, match="f:3: no split"):
        in_split([*carried, Record("prompt", "c", where="f:3")], "x")
