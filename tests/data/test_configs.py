"""Configurations that the README.md of a folder declares, read as `datasets` reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.data.sources import read_source
from rlhf_pipeline.errors import DataError

FILES = {
    "pairs/train-0.jsonl": "a",
    "pairs/train-1.jsonl": "b",
    "pairs/held.jsonl": "c",
    "pairs/deep/er/train-2.jsonl": "d",
    "sft/x.jsonl": "e",
    "sft/.hidden.jsonl": "f",
    "sft/__old/x.jsonl": "g",
    "by_name/train.jsonl": "h",
    "by_name/test.jsonl": "i",
}
CARD = """---
license: mit
configs:
- config_name: prefs
  default: true
  data_files:
  - split: train_prefs
    path: pairs/**/train-*.jsonl
  - split: test_prefs
    path: [pairs/held.jsonl, sft/*.jsonl]
- config_name: sft
  data_files: sft/**
- config_name: twice
  data_files: ["pairs/train-*.jsonl", pairs/train-1.jsonl]
- config_name: named
  data_dir: by_name
---
# A data set

configs: no more of them
"""
ROWS = {  # (split, text), by hand
    None: [*(("train_prefs", text) for text in "dab"), ("test_prefs", "c"), ("test_prefs", "e")],
    "sft": [(None, "e")],
    "twice": [(None, "a"), (None, "b"), (None, "b")],
    "named": [("train", "h"), ("test", "i")],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "set" / "README.md").write_text(CARD)
    return tmp_path / "set"


def read(folder, config=None, **options) -> list[tuple[str | None, str]]:
    return [(row.get("split"), row["text"]) for _, row in read_source(str(folder), config=config, **options).rows]


def in_order(rows: list[tuple[str | None, str]]) -> list[tuple[str | None, str]]:
    """The rows, split by split; the order of the splits has no meaning."""
    return sorted(rows, key=lambda row: str(row[0]))


def test_the_files_of_a_configuration_and_their_splits(folder):
    for config, expected in ROWS.items():
        assert in_order(read(folder, config)) == in_order(expected), config
    assert read(folder, "prefs", split="test_prefs") == [("test_prefs", "c"), ("test_prefs", "e")]
    (folder / "README.md").write_text(CARD.replace("\n", "\r\n"), encoding="utf-8-sig")  # as Windows' Notepad writes it
    assert read(folder, "prefs", split="test_prefs") == [("test_prefs", "c"), ("test_prefs", "e")]
    (folder / "README.md").write_text(CARD.replace("configs:", "files:"))
    with pytest.raises(DataError, match="files of the splits"):  # names of files tell their splits again
        read(folder)


@pytest.mark.check
def test_datasets_reads_the_same(folder, tmp_path):
    import datasets

    for config, expected in ROWS.items():
        loaded = datasets.load_dataset(str(folder), config, cache_dir=str(tmp_path / "cache"))
        several = len(loaded) > 1
        found = [(name if several else None, row["text"]) for name, rows in loaded.items() for row in rows]
        assert in_order(found) == in_order(expected), config
    (folder / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(ValueError, match="Config name is missing"):
        datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


def test_a_declaration_that_cannot_be_followed_is_refused(folder):
    for old, new, config, found in (
        ("", "", "sfd", "no configuration 'sfd'; expected one of prefs, sft, twice, named; did you mean 'sft'"),
        ("  default: true\n", "", None, "none of them the default.*set dataset_config"),
        ("sft/**", "nothing/*", "sft", "sft: data_files: no file is called 'nothing/*'"),
        ("sft/**", "../*", "sft", "leads out of the folder"),
        ("sft/**", "https://example.org/x.jsonl", "sft", "leads out of the folder"),
        ("data_dir: by_name", "data_dir: /etc", "named", "leads out of the folder"),
        ("sft/**", "[{split: a}]", "sft", "glob pattern"),
        ("train_prefs\n", "test_prefs\n", None, "a split given twice"),
        ("data_dir: by_name", "sep: x", "named", "sep, which is not read here"),
        ("config_name: sft", "name: sft", None, "each with config_name"),
        ("license: mit", "license: [", None, "README.md:.* not YAML"),
    ):
        (folder / "README.md").write_text(CARD.replace(old, new) if old else CARD)
        with pytest.raises(DataError, match=found.replace("*'", r"\*'")):
            read(folder, config)
