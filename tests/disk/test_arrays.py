"""Tables on disk: made once and whole, whatever happens to those who write them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time

import numpy as np
import pytest

from rlhf_pipeline.disk import arrays
from rlhf_pipeline.disk.arrays import Writer, stored
from rlhf_pipeline.errors import RunFailed


def fill(writer: Writer) -> dict[str, int]:
    for part in (range(3), range(3, 5), range(0)):
        writer.add("numbers", np.array(part, np.uint16))
        writer.add("pairs", np.array([[n, -n] for n in part], np.int64).reshape(-1, 2))
        writer.texts("words", [f"wörd {n}" for n in part])
    return {"rows": 5}


def check(table) -> None:
    assert table["numbers"].tolist() == [0, 1, 2, 3, 4] and table["numbers"].dtype == np.uint16
    assert table["pairs"].tolist() == [[n, -n] for n in range(5)]
    assert [table.text("words", n) for n in range(5)] == [f"wörd {n}" for n in range(5)]
    assert table.about == {"rows": 5}


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_table_is_the_same_in_memory_and_on_disk_and_made_once(tmp_path):
    writer = Writer()
    check(writer.table(fill(writer)))
    said: list[str] = []
    check(stored(tmp_path / "cache" / "one", fill, said.append))
    check(stored(tmp_path / "cache" / "one", lambda _: pytest.fail("made again"), said.append))
    assert not said and not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("name", ["numbers.bin", "words_ends.bin", "table.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_table_is_made_again_with_a_line(tmp_path, name, how):
    folder, said = tmp_path / "one", []
    stored(folder, fill, said.append)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).unlink()
    if how != "gone":
        (folder / name).write_bytes(content if how == "flip" else content[:-1])
    check(stored(folder, fill, said.append))
    assert len(said) == 1 and "damaged" in said[0]
    check(stored(folder, lambda _: pytest.fail("made again"), said.append))


def test_a_full_disk_leaves_nothing_and_is_one_line(tmp_path, monkeypatch):
    def full(self, name, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / name))

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "texts", lambda self, name, texts: full(self, name, texts))
        with pytest.raises(RunFailed, match="disk full"):
            stored(tmp_path / "one", fill, print)
    assert not (tmp_path / "one").exists() and not list(tmp_path.glob(".*.tmp"))
    check(stored(tmp_path / "one", fill, print))


def test_what_a_killed_process_leaves_is_not_read_and_is_removed(tmp_path):
    child = os.fork()
    if not child:

        def killed(writer: Writer) -> dict[str, int]:
            writer.add("numbers", np.arange(9))
            os.kill(os.getpid(), signal.SIGKILL)
            return {}

        stored(tmp_path / "one", killed, print)
        os._exit(1)
    assert wait(child) == -signal.SIGKILL
    assert list(tmp_path.glob(".one-*.tmp")) and not (tmp_path / "one").exists()
    check(stored(tmp_path / "one", fill, print))
    assert not list(tmp_path.glob(".one-*.tmp"))


def test_a_table_that_is_deleted_at_once_can_be_read(tmp_path, monkeypatch):
    folder, claim = tmp_path / "one", arrays.claim

    def gone(staged, target):
        claim(staged, target)
        shutil.rmtree(target)

    monkeypatch.setattr(arrays, "claim", gone)
    check(stored(folder, fill, print))
    assert not folder.exists()


def test_an_error_of_the_system_is_no_damage(tmp_path, monkeypatch):
    """Too many open files, or a disk that does not answer: the table stays, and others may read it."""
    folder, said = tmp_path / "one", []
    check(stored(folder, fill, said.append))
    monkeypatch.setattr(arrays, "_VERIFIED", {})

    def fails(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "digest_of", fails)
        with pytest.raises(OSError, match="Too many open files"):
            stored(folder, fill, said.append)
    check(stored(folder, lambda _: pytest.fail("made again"), said.append))
    assert not said


def test_one_of_several_processes_makes_a_table_and_the_others_wait_for_it(tmp_path):
    log = tmp_path / "made"

    def slowly(writer: Writer) -> dict[str, int]:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.2)  # the others come while this one writes
        return fill(writer)

    children = []
    for _ in range(3):
        if not (child := os.fork()):
            status = 1
            try:
                check(stored(tmp_path / "one", slowly, print))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [wait(child) for child in children] == [0, 0, 0]
    assert log.read_text() == "x"


def test_a_table_that_was_verified_is_not_read_again_as_long_as_it_does_not_change(tmp_path, monkeypatch):
    stored(tmp_path / "one", fill, print)
    time.sleep(0.06)  # `stamps.SETTLED`
    stored(tmp_path / "one", fill, print)
    monkeypatch.setattr(arrays, "digest_of", lambda path: pytest.fail("read again"))
    check(stored(tmp_path / "one", fill, print))
