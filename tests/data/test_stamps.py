"""What this process has read before is not read again, unless a file has changed or is too new to tell."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from rlhf_pipeline.data import parsed as parsing
from rlhf_pipeline.data import sources
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.disk import stamps
from rlhf_pipeline.errors import DataError

ROW = {"prompt": "abc", "chosen": "a", "rejected": "b"}


@pytest.fixture
def parsed(monkeypatch) -> Counter[str]:
    """How often each file is parsed, by its name; files count as settled at once."""
    monkeypatch.setattr(stamps, "SETTLED", 0)
    monkeypatch.setattr(parsing, "_PARSED", type(parsing._PARSED)())
    counts: Counter[str] = Counter()
    rows_in = sources.rows_in

    def counted(path: Path, *rest):
        counts[path.name] += 1
        return rows_in(path, *rest)

    monkeypatch.setattr(sources, "rows_in", counted)
    return counts


def later(path: str, seconds: int = 10) -> None:
    """Let a file's time of change be another, as if it had been written later."""
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + seconds * 10**9))


def test_a_source_is_parsed_once_whatever_is_asked_of_it(jsonl, parsed, letters):
    source = jsonl(ROW, {**ROW, "chosen": None})
    for _ in range(2):
        assert len(read_records(source, skip_bad_rows=True).records) == 1
        with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
            read_records(source, kind="pair", tokenizer=letters)
    assert parsed == {"rows.jsonl": 1}


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_changed_file_is_parsed_again(jsonl, parsed, change):
    source = jsonl(ROW)
    assert read_records(source).records[0].prompt == "abc"
    before = os.stat(source)
    if change == "content":
        jsonl({**ROW, "prompt": "xyz"})  # of the same size
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # and with the old time of modification
    later(source, 10 if change == "time" else 0)
    assert read_records(source).records[0].prompt == ("xyz" if change == "content" else "abc")
    assert parsed == {"rows.jsonl": 2}
    assert len(parsing._PARSED) == 1  # the outdated one has gone


def test_what_a_caller_does_with_its_records_stays_with_it(jsonl, parsed):
    source = jsonl(ROW, {**ROW, "prompt": "d"}, "{")
    found = read_records(source, skip_bad_rows=True)
    found.records.clear()
    found.faults.clear()
    found.skipped["mine"] = 1
    again = read_records(source, skip_bad_rows=True)
    assert [record.prompt for record in again.records] == ["abc", "d"]
    assert (len(again.faults), again.skipped["mine"]) == (1, 0)
    assert parsed == {"rows.jsonl": 1}


def test_another_name_of_a_file_has_its_own_places(jsonl, parsed, monkeypatch):
    source = jsonl(ROW)
    monkeypatch.chdir(Path(source).parent)
    assert read_records("rows.jsonl").records[0].where == "rows.jsonl:1"
    assert read_records(source).records[0].where == f"{source}:1"


def test_no_more_is_kept_than_the_bound(jsonl, parsed, monkeypatch):
    sizes = {name: os.stat(jsonl(ROW, name=name)).st_size for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    one = sizes["a.jsonl"]
    paths = {name: jsonl(ROW, name=name) for name in sizes}
    monkeypatch.setattr(parsing, "KEPT_BYTES", 2 * one)
    for name in ("a.jsonl", "b.jsonl", "a.jsonl", "c.jsonl", "a.jsonl", "b.jsonl"):
        read_records(paths[name])  # c takes the place of b, which is read least recently
    assert parsed == {"a.jsonl": 1, "b.jsonl": 2, "c.jsonl": 1}
    monkeypatch.setattr(parsing, "KEPT_BYTES", one - 1)
    for _ in range(2):
        later(paths["c.jsonl"])
        read_records(paths["c.jsonl"])
    assert parsed["c.jsonl"] == 3


def test_a_file_that_was_just_written_is_parsed_each_time(jsonl, parsed, monkeypatch):
    monkeypatch.setattr(stamps, "SETTLED", 3600)
    source = jsonl(ROW)
    read_records(source), read_records(source)
    assert parsed == {"rows.jsonl": 2}


def test_the_latest_version_of_collected_data_is_looked_up_each_time(tmp_path, parsed):
    from rlhf_pipeline.registry.store import Registry

    registry = Registry(tmp_path)
    for prompt in ("first", "second"):
        registry.publish_data("pairs", [{**ROW, "prompt": prompt}])
        for _ in range(2):
            assert read_records("collected:pairs", home=tmp_path).records[0].prompt == prompt
    assert parsed == {"records.jsonl": 2}


def test_changed_collected_data_are_refused_after_they_were_read(tmp_path, parsed):
    from rlhf_pipeline.errors import DamagedFile
    from rlhf_pipeline.registry.store import Registry

    version = Registry(tmp_path).publish_data("pairs", [ROW])
    read_records("collected:pairs", home=tmp_path)
    for name in ("records.jsonl", "manifest.json"):
        path = version.path / name
        whole, before = path.read_bytes(), path.stat()
        path.write_bytes(whole.replace(b"a", b"c", 1))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(DamagedFile):
            read_records("collected:pairs", home=tmp_path)
        path.write_bytes(whole)


def test_a_stamp_by_hand(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text(json.dumps(ROW))
    found = path.stat()
    monkeypatch.setattr(stamps.time, "time_ns", lambda: found.st_ctime_ns + 10**9)
    expected = (str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    assert stamps.stamp([path]) == (expected,)
    assert stamps.stamp([]) == ()
    assert stamps.stamp([path, tmp_path / "absent"]) is None
    monkeypatch.setattr(stamps.time, "time_ns", lambda: found.st_ctime_ns + 10**6)
    assert stamps.stamp([path]) is None
