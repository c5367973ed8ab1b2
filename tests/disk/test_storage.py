from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import RunFailed


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


def test_the_errors_of_libraries_in_rust_are_read_too(tmp_path):
    for number, found in ((28, "disk full"), (13, "no permission"), (30, "no permission")):
        with pytest.raises(RunFailed, match=f"{found}: {tmp_path}: "), storage.staging(tmp_path, "sft"):
            raise RuntimeError(f"Error while serializing: I/O error: something (os error {number})")
    with pytest.raises(RuntimeError), storage.staging(tmp_path, "sft"):
        raise RuntimeError("I/O error: something (os error 2)")


def test_a_tree_that_cannot_be_copied_says_so_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    for name in ("a", "b"):
        (tmp_path / "source" / name).write_text("x")

    def full(source, target, **_options):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    with pytest.raises(RunFailed) as error, storage.staging(tmp_path / "home", "sft") as folder:
        shutil.copytree(tmp_path / "source", folder / "copy", copy_function=full)
    assert str(error.value).startswith(f"disk full: {tmp_path / 'home'}: No space left on device")
    assert "\n" not in str(error.value)


@pytest.fixture
def others(tmp_path):
    """Folders of two other processes that stage: one of them waits, the other is killed."""
    started = []
    for name in ("alive", "dead"):
        code = f"""
            import sys
            from pathlib import Path
            from rlhf_pipeline.disk import storage

            with storage.staging(Path({str(tmp_path)!r}), {name!r}) as folder:
                (folder / "part").write_text("x")
                print(folder, flush=True)
                sys.stdin.read()
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    folders = [Path(process.stdout.readline().strip()) for process in started]
    started[1].kill()
    started[1].wait()
    yield folders
    started[0].communicate("")


def test_leftovers_of_the_dead_go_at_the_next_staging_and_the_work_of_the_living_stays(tmp_path, others):
    alive, dead = others
    assert alive.is_dir() and dead.is_dir()
    with storage.staging(tmp_path, "sft") as own:
        assert not dead.exists()
        storage.sweep(tmp_path)
        assert (alive / "part").exists() and own.is_dir()


def test_a_file_that_a_dead_process_left_goes_with_the_next_one_of_its_folder(tmp_path):
    left = tmp_path / ".curves.csv-0ae6bed7f5d7.tmp"
    left.write_text("half")
    storage.replace_text(tmp_path / "index.html", "page")
    assert os.listdir(tmp_path) == ["index.html"]


def test_a_file_that_is_being_written_is_not_swept(tmp_path, monkeypatch):
    replace, swept = os.replace, []

    def sweeping(source, target):
        storage.sweep(tmp_path)
        swept.append(os.path.exists(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", sweeping)
    storage.replace_text(tmp_path / "aliases.json", "new")
    assert swept == [True] and (tmp_path / "aliases.json").read_text() == "new"


def test_a_file_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, made = storage.lock, []

    def late(handle, how):
        made.append(sorted(tmp_path.glob(".*.tmp")))
        if len(made) == 1:
            made[0][0].unlink()
        return lock(handle, how)

    monkeypatch.setattr(storage, "sweep", lambda parent: None)
    monkeypatch.setattr(storage, "lock", late)
    storage.replace_text(tmp_path / "aliases.json", "new")
    assert len(made) == 2 and (tmp_path / "aliases.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["aliases.json"]


def test_where_there_are_no_locks_temporary_files_go_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "lock", lambda handle, how: False)
    old, young = tmp_path / ".aliases.json-old.tmp", tmp_path / ".aliases.json-young.tmp"
    for file in (old, young):
        file.write_text("{")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    storage.sweep(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_link_is_not_followed(tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("x")
    (tmp_path / ".x.tmp").symlink_to(target)
    storage.sweep(tmp_path)
    assert (target / "file").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_who_may_not_read_is_not_told_to_allow_writing(tmp_path, number):
    error = OSError(number, os.strerror(number), str(tmp_path / "config.json"))
    read, written = storage.failure_of(error, tmp_path), storage.failure_of(error, tmp_path, "a card")
    assert "writ" not in read and str(tmp_path / "config.json") in read
    assert "while writing a card" in written and "allow writing there" in written
