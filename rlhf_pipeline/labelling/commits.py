"""Writes to a SQLite file by one thread, which commits those that wait together."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from rlhf_pipeline.disk.storage import writing
from rlhf_pipeline.errors import DamagedFile, RunFailed, first_line

T = TypeVar("T")
Write = tuple[Callable[[sqlite3.Connection], Any], "Future[Any]"]

AT_ONCE = 256
"""Number of writes, at most, that share a commit."""
BUSY_SECONDS = 30.0
"""How long a connection waits for the lock of another process."""


class Connection(sqlite3.Connection):
    """A connection that is closed with the thread that uses it."""

    def __del__(self) -> None:
        self.close()


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection to a file that exists; a commit is on disk before it returns."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    db = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, factory=Connection
    )
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=ON")
    return db


class GroupCommits:
    """Writes that wait share a transaction; each is answered after the commit, or not at all.

    on_rollback: called, by the thread that writes, when something that a write has read or written is undone.
    """

    def __init__(self, path: Path, on_rollback: Callable[[], None]):
        self._path, self._on_rollback = path, on_rollback
        self._waiting: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def do(self, write: Callable[[sqlite3.Connection], T]) -> T:
        """Return what a write returns, after its commit."""
        return self.soon(write).result()

    def soon(self, write: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Return a future that is done after the commit of a write."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RunFailed(f"{self._path}: the labelling project is closed; nothing was recorded")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="labels", daemon=True)
                self._thread.start()
            self._waiting.put((write, future))
        return future

    def close(self) -> None:
        """Commit what waits, and end the thread."""
        with self._lock:
            self._closed = True
            self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        db: sqlite3.Connection | None = None
        last = False
        while not last:
            batch = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < AT_ONCE and batch[-1] is not None:
                    batch.append(self._waiting.get_nowait())
            last = batch[-1] is None
            writes = [one for one in batch if one is not None and one[1].set_running_or_notify_cancel()]
            if not writes:
                continue
            try:
                with writing(self._path, "labels"):
                    db = db or connect(self._path)
                    self._commit(db, writes)
            except Exception as error:  # it belongs to those who wait, not to this thread
                self._on_rollback()
                if db is not None and db.in_transaction:
                    db.execute("ROLLBACK")
                failure = error if isinstance(error, RunFailed) else _failure(self._path, error)
                for _, future in writes:
                    if not future.done():
                        future.set_exception(failure)
        if db is not None:
            db.close()

    def _commit(self, db: sqlite3.Connection, writes: list[Write]) -> None:
        """Write all, commit once, then answer. A write that fails is undone alone."""
        answers: list[tuple[Future[Any], Any, Exception | None]] = []
        db.execute("BEGIN IMMEDIATE")
        for write, future in writes:
            db.execute("SAVEPOINT one")
            try:
                answers.append((future, write(db), None))
            except Exception as error:
                if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
                    raise  # of the whole transaction: the disk is full, a lock was lost
                db.execute("ROLLBACK TO one")
                self._on_rollback()
                answers.append((future, None, error))
            db.execute("RELEASE one")
        db.execute("COMMIT")
        for future, result, failed in answers:
            if failed is None:
                future.set_result(result)
            else:
                future.set_exception(failed)


def _failure(path: Path, error: Exception) -> RunFailed:
    failure = RunFailed(f"{path}: {error}; what waited was not recorded, all that was recorded is intact; try again")
    failure.__cause__ = error
    return failure


def unreadable(path: Path, error: Exception) -> RunFailed | DamagedFile:
    """Why a storage could not be read: it cannot be now (locked, not permitted), or it is damaged."""
    if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
        return RunFailed(f"{path}: {error}; nothing was changed; try again")
    return DamagedFile(f"{path}: {first_line(error)}; expected the storage of a labelling project")
