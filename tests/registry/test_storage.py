from __future__ import annotations

import errno
import os
import time

import pytest

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.registry import storage


def test_only_the_first_claims_a_place(tmp_path):
    for number in (1, 2):
        (tmp_path / f"staged{number}").mkdir()
        (tmp_path / f"staged{number}" / "file").write_text(str(number))
    target = tmp_path / "name" / "v1"
    assert storage.claim(tmp_path / "staged1", target)
    assert not storage.claim(tmp_path / "staged2", target)
    assert (target / "file").read_text() == "1"
    assert (tmp_path / "staged2" / "file").exists()


def test_replacing_keeps_the_old_content_where_writing_fails(tmp_path):
    path = tmp_path / "aliases.json"
    storage.replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        storage.replace_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["aliases.json"]


def test_full_disk_is_a_failed_run_and_leaves_nothing(tmp_path):
    with pytest.raises(RunFailed, match="free some space"), storage.staging(tmp_path, "sft") as folder:
        (folder / "part").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path):
    old, young = tmp_path / ".sft-old.tmp", tmp_path / ".sft-young.tmp"
    for folder in (old, young):
        folder.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    with storage.staging(tmp_path, "sft"):
        assert not old.exists()
        assert young.exists()
