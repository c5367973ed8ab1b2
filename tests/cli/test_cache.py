"""`rlhf cache`: what is there, and what is removed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data import parsed
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.disk.arrays import TABLE

DAY = 24 * 3600


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home with the stores of two sources, a tensor and two answers; the older ones are unused for 40 days."""
    monkeypatch.setattr(parsed, "STORED_BYTES", 0)
    for name in ("old", "new"):
        source = tmp_path / f"{name}.jsonl"
        source.write_text('{"prompt": "a", "completion": "b"}\n')
        read_records(str(source), home=tmp_path / "home")
    cache = tmp_path / "home" / "cache"
    (cache / "llm" / "ab").mkdir(parents=True)
    for path in (cache / "reference-0a.safetensors", cache / "llm" / "ab" / "1.json", cache / "llm" / "ab" / "2.json"):
        path.write_bytes(b"x" * 500)
    then = time.time() - 40 * DAY
    for path in (store(cache, "old") / TABLE, cache / "reference-0a.safetensors", *(cache / "llm" / "ab").iterdir()):
        os.utime(path, (then, then))
    return tmp_path / "home"


def store(cache: Path, name: str) -> Path:
    """The folder of a source's store."""
    tables = cache.glob(f"tokens/*/{TABLE}")
    return next(path.parent for path in tables if f"{name}.jsonl" in json.loads(path.read_text())["about"]["source"])


def shown(capsys, *words: str) -> dict:
    assert main(["cache", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_is_listed_the_least_recently_used_first(home, capsys):
    found = shown(capsys, "list", "--home", str(home))
    kinds = [(entry["kind"], entry["source"].rpartition("/")[2]) for entry in found["entries"]]
    assert sorted(kinds[:3]) == [("llm", ""), ("records", "old.jsonl"), ("reference", "")]
    assert kinds[3:] == [("records", "new.jsonl")]
    sizes = {entry["kind"]: entry["size"] for entry in found["entries"]}
    assert (sizes["llm"], sizes["reference"]) == (1000, 500)
    folder = store(home / "cache", "new")
    assert sizes["records"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["bytes"] == sum(entry["size"] for entry in found["entries"])
    assert main(["cache", "list", "--home", str(home)]) == 0
    assert folder.name in capsys.readouterr().out


def test_what_is_unused_is_removed_and_made_again(home, tmp_path, capsys):
    old, new = (store(home / "cache", name) for name in ("old", "new"))
    would = shown(capsys, "clean", "--home", str(home), "--dry-run")
    assert would["removed"] == [] and len(would["entries"]) == 2 and old.is_dir()
    found = shown(capsys, "clean", "--home", str(home))
    assert {Path(entry["path"]).name for entry in found["removed"]} == {old.name, "reference-0a.safetensors"}
    assert not old.exists() and new.is_dir() and (home / "cache/llm/ab/1.json").is_file()
    assert not list((home / "cache" / "tokens").glob(".*.tmp"))
    assert read_records(str(tmp_path / "old.jsonl"), home=home).records[0].prompt == "a"
    assert old.is_dir()


def test_a_store_that_is_removed_can_be_read_on(home, tmp_path, capsys):
    found = read_records(str(tmp_path / "new.jsonl"), home=home)
    assert len(shown(capsys, "clean", "--home", str(home), "--unused-for", "0")["removed"]) == 3
    assert found.records[0].prompt == "a" and not list((home / "cache" / "tokens").glob(f"*/{TABLE}"))


def test_reading_a_store_is_using_it(home, tmp_path, capsys):
    read_records(str(tmp_path / "old.jsonl"), home=home)
    found = shown(capsys, "clean", "--home", str(home))
    assert [Path(entry["path"]).name for entry in found["removed"]] == ["reference-0a.safetensors"]


def test_a_home_without_a_cache_has_nothing(tmp_path, capsys):
    assert shown(capsys, "list", "--home", str(tmp_path))["entries"] == []
    assert shown(capsys, "clean", "--home", str(tmp_path))["removed"] == []
    assert main(["cache", "list", "--home", str(tmp_path)]) == 0
    assert "nothing in" in capsys.readouterr().out
