"""Values of the cache: made once, whoever asks, and again if they are damaged."""

from __future__ import annotations

import fcntl
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from rlhf_pipeline.disk.kept import Busy, claimed, kept


def unasked():
    raise AssertionError("made again")


def test_what_was_made_is_read_bit_for_bit(tmp_path: Path):
    path = tmp_path / "cache" / "one.json"
    value = {"rows": [0.1 + 0.2, 5e-324, -0.0, math.inf], "none": None, "text": "ä\n", "nan": [math.nan]}
    for found in (kept(path, lambda: value), kept(path, unasked)):
        assert math.isnan(found.pop("nan")[0])
        assert found == {key: part for key, part in value.items() if key != "nan"}
        assert math.copysign(1, found["rows"][2]) == -1
    assert [one.name for one in path.parent.iterdir()] == ["one.json"]
    os.utime(path, (1, 1))
    kept(path, unasked)
    assert path.stat().st_mtime > 1  # `rlhf cache clean` removes what is not used


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"{}\n", b"0" * 64 + b"\n[1]\n"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: bytes):
    path = tmp_path / "one.json"
    kept(path, lambda: [1])
    path.write_bytes(damage)
    assert kept(path, lambda: [2]) == [2]
    assert kept(path, unasked) == [2]
    path.write_bytes(path.read_bytes().replace(b"[2]", b"[3]"))
    assert kept(path, lambda: [4]) == [4]


def test_after_an_error_the_next_one_makes_it(tmp_path: Path):
    path = tmp_path / "one.json"
    with pytest.raises(AssertionError):
        kept(path, unasked)
    assert kept(path, lambda: 7, wait=False) == 7


def test_one_makes_it_and_the_others_get_it(tmp_path: Path):
    path, made, ready = tmp_path / "one.json", [], Barrier(4)

    def ask(number: int) -> int:
        ready.wait()
        return kept(path, lambda: made.append(number) or number)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(made) == 1 and found == made * 4


def test_what_another_one_is_making_is_passed_over(tmp_path: Path):
    path = tmp_path / "one.json"
    with claimed(path):
        with pytest.raises(Busy):
            kept(path, unasked, wait=False)
        with path.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert kept(path, lambda: 1, wait=False) == 1
