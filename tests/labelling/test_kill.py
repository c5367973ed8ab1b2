"""The quick part of what `make faults` does at length: a server is killed while browsers label; many label at once."""

from __future__ import annotations

import sqlite3
from concurrent.futures import Future
from pathlib import Path

import pytest

from rlhf_pipeline.labelling.commits import GroupCommits
from tests.labelling import kill, load

pytestmark = [pytest.mark.check, pytest.mark.slow]
pytest.importorskip("fastapi", reason="the extra label is not installed")


def test_no_acknowledged_action_is_lost_or_doubled(tmp_path: Path) -> None:
    found = kill.kills(tmp_path, 12, 1)
    assert found["failed"] == []
    assert found["kills"] == 12
    assert found["acknowledged"] > 100
    assert found["resent"] > 0  # kills came between an action and its answer


def test_the_harness_sees_an_answer_before_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(self: GroupCommits, db: sqlite3.Connection, writes: list[tuple[object, Future[object]]]) -> None:
        """The fault: what is answered is committed with the next one."""
        if not db.in_transaction:
            db.execute("BEGIN IMMEDIATE")
        for write, future in writes:
            future.set_result(write(db))  # type: ignore[operator]
        count = getattr(self, "count", 0) + 1
        self.count = count  # type: ignore[attr-defined]
        if count % 2 == 0:
            db.execute("COMMIT")

    monkeypatch.setattr(GroupCommits, "_commit", early)
    found = kill.kills(tmp_path, 4, 2)
    assert any("lost" in fault or "found" in fault for fault in found["failed"])


def test_every_action_of_many_labelers_is_stored(tmp_path: Path) -> None:
    found = load.load(tmp_path, labelers=20, rate=5, seconds=2)
    assert found["failed"] == []
    assert found["actions"] == 200
