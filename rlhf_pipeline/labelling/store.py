"""The storage of a labelling project: one SQLite file to which every action of a labeler is added as an event."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import sqlite3
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from pydantic import ValidationError

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.errors import UNSEEN, BadInput
from rlhf_pipeline.labelling.commits import GroupCommits, connect, unreadable
from rlhf_pipeline.labelling.events import Event, Refused, Task, check, fold, judgement
from rlhf_pipeline.labelling.kinds import Action, Item, Judgement, TaskState, UndoAction
from rlhf_pipeline.labelling.origins import Origin
from rlhf_pipeline.labelling.rows import EVENT, TASK, add_event, add_items, event_of, find_task, read_items, task_of
from rlhf_pipeline.labelling.schema import VERSION, database, make
from rlhf_pipeline.labelling.tasks import Progress, next_task, progress_of

__all__ = ["LabelStore", "Progress", "Refused", "database"]

_CACHED = 2048
_CLIENT = re.compile(r"[A-Za-z0-9_-]{1,64}")


class LabelStore:
    """A labelling project on disk. Any number of threads and processes may use it at the same time.

    What a method has returned is on disk: it survives a kill and a power cut. Reads use one connection a thread; all
    writes of a process go through one thread, which commits those that wait together.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        self.path, self.clock = path, clock
        self._threads = threading.local()
        self._commits = GroupCommits(path, on_rollback=lambda: self._recent.clear())
        self._items: dict[int, Item] = {}
        self._recent: dict[int, list[Event]] = {}  # events of tasks, read and written by the thread that commits
        version = self._meta("version")
        if version != VERSION:
            raise BadInput(f"{path}: found version {version} of the storage; expected {VERSION}; upgrade this package")
        self.config = LabelConfig.model_validate_json(self._meta("config"))
        self.origin = Origin.model_validate_json(self._meta("origin"))

    # Opening and closing.

    @classmethod
    def create(
        cls,
        path: Path,
        config: LabelConfig,
        items: Sequence[Item],
        uncertainty: Sequence[float] | None = None,
        origin: Origin | None = None,
    ) -> LabelStore:
        """Make the storage of a new project; it appears whole or not at all. The items must be numbered from 0.

        uncertainty: one figure per item; items with the highest come first. By default their order is by hash.
        origin: where the responses come from.

        Raises:
            BadInput: there is a project already, or the items cannot be used.
        """
        make(path, config, items, uncertainty, origin or Origin())
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> LabelStore:
        """Open the storage of a project.

        Raises:
            BadInput: there is none. DamagedFile: the file is no storage of labels. RunFailed: it cannot be read now.
        """
        if not path.is_file():
            raise BadInput(f"{path}: there is no labelling project; expected one; see rlhf label list")
        try:
            return cls(path)
        except ValidationError as error:
            raise unreadable(path, error) from error

    def close(self) -> None:
        """Commit what waits, and end the thread that commits."""
        self._commits.close()

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Items.

    def item(self, number: int) -> Item:
        """Return an item."""
        if number not in self._items:
            with self._read() as db:
                self._items.update({item.number: item for item in read_items(db, [number])})
        if number not in self._items:
            raise Refused(f"item {number}: there is none")
        return self._items[number]

    def items(self) -> list[Item]:
        """Return all items, in the order of their numbers."""
        with self._read() as db:
            (count,) = db.execute("SELECT count(*) FROM items").fetchone()
            missing = [number for number in range(count) if number not in self._items]
            self._items.update({item.number: item for item in read_items(db, missing)})
        return [self._items[number] for number in range(count)]

    def extend(self, items: Sequence[Item], batch: str, uncertainty: Sequence[float] | None = None) -> list[int]:
        """Add items, and return their numbers, which follow those that are there. The same batch is added only once."""

        def add(db: sqlite3.Connection) -> list[int]:
            key = f"batch:{batch}"
            if row := db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone():
                return list(json.loads(row[0]))
            (first,) = db.execute("SELECT count(*) FROM items").fetchone()
            numbers = list(range(first, first + len(items)))
            added = [item.model_copy(update={"number": n}) for item, n in zip(items, numbers, strict=True)]
            add_items(db, self.config, added, uncertainty, first)
            db.execute("INSERT INTO meta VALUES (?, ?)", (key, json.dumps(numbers)))
            return numbers

        return self._commits.do(add)

    # Labelers.

    def labeler(self, name: str) -> int:
        """Return the number of the labeler of this name, who is added if new; capital letters make no difference.

        Raises:
            Refused: this cannot be a name.
        """
        name = " ".join(unicodedata.normalize("NFC", name).split())
        if not 1 <= len(name) <= 64 or UNSEEN.search(name):
            raise Refused("name: expected 1 to 64 characters that can be seen")

        def find(db: sqlite3.Connection) -> int:
            key = name.casefold()
            db.execute("INSERT INTO labelers (key, name) VALUES (?, ?) ON CONFLICT DO NOTHING", (key, name))
            return int(db.execute("SELECT number FROM labelers WHERE key = ?", (key,)).fetchone()[0])

        return self._commits.do(find)

    def labelers(self) -> list[int]:
        """Return the numbers of all labelers."""
        with self._read() as db:
            return [number for (number,) in db.execute("SELECT number FROM labelers ORDER BY number")]

    def name(self, labeler: int) -> str:
        """Return a labeler's name, for the labeler's own page; it belongs in no export."""
        with self._read() as db:
            row = db.execute("SELECT name FROM labelers WHERE number = ?", (labeler,)).fetchone()
        if row is None:
            raise Refused(f"labeler {labeler}: there is none")
        return str(row[0])

    def new_session(self, labeler: int, token: str | None = None) -> str:
        """Return a secret that stands for a labeler, also after a restart; only its SHA-256 is stored.

        token: the access token of the server; the secret is worth nothing beside another one.
        """
        secret = secrets.token_urlsafe(32)
        digest = _digest(secret, token)
        self._commits.do(lambda db: db.execute("INSERT INTO sessions VALUES (?, ?)", (digest, labeler)))
        return secret

    def session(self, secret: str, token: str | None = None) -> int | None:
        """Return the labeler of a session; None if there is no such session."""
        with self._read() as db:
            row = db.execute("SELECT labeler FROM sessions WHERE digest = ?", (_digest(secret, token),)).fetchone()
        return None if row is None else int(row[0])

    def end_session(self, secret: str, token: str | None = None) -> None:
        """Make a secret worthless."""
        digest = _digest(secret, token)
        self._commits.do(lambda db: db.execute("DELETE FROM sessions WHERE digest = ?", (digest,)))

    # Tasks and actions.

    def task(self, labeler: int) -> TaskState | None:
        """Return the labeler's open task (the earliest, if several are), else a new one; None: nothing is left."""
        with self._read() as db:
            row = db.execute(f"{TASK} WHERE labeler = ? AND status = 'open' ORDER BY number", (labeler,)).fetchone()
            if row is not None:
                return self._state(db, task_of(row))

        def following(db: sqlite3.Connection) -> TaskState | None:
            number = next_task(db, self.config, labeler, self.clock())
            return None if number is None else self._state(db, find_task(db, number))

        return self._commits.do(following)

    def state(self, task: int) -> TaskState:
        """Return the state of a task.

        Raises:
            Refused: there is no such task.
        """
        with self._read() as db:
            return self._state(db, find_task(db, task))

    def previous(self, labeler: int, task: int) -> int | None:
        """Return the labeler's task before this one; None if it is the first."""
        with self._read() as db:
            query = "SELECT max(number) FROM tasks WHERE labeler = ? AND number < ?"
            found: int | None = db.execute(query, (labeler, task)).fetchone()[0]
        return found

    def back(self, labeler: int, task: int) -> TaskState:
        """Open one of the labeler's earlier tasks again: its submit or skip is taken back, by an event like any other.

        Raises:
            Refused: the task is not the labeler's.
        """

        def again(db: sqlite3.Connection) -> TaskState:
            found = find_task(db, task, labeler)
            state = fold(self.item(found.item), found, self._events(db, found))
            return state if state.status == "open" else self._add(db, found, UndoAction(), f"back-{uuid.uuid4().hex}")

        return self._commits.do(again)

    def record(self, labeler: int, task: int, action: Action, client: str) -> TaskState:
        """Record an action, and return the state after it once both are on disk.

        client: a unique id of the action; an action with the same id is recorded only once.

        Raises:
            Refused: the action cannot be, or the task is not the labeler's. RunFailed: the disk is full.
        """
        return self.record_soon(labeler, task, action, client).result()

    def record_soon(self, labeler: int, task: int, action: Action, client: str) -> Future[TaskState]:
        """Record an action as `record` does; the future is done once the action is on disk."""

        def add(db: sqlite3.Connection) -> TaskState:
            if _CLIENT.fullmatch(client) is None:
                raise Refused("client: expected 1 to 64 letters, digits, '-' or '_', unique to the action")
            found = find_task(db, task, labeler)
            earlier = db.execute("SELECT task, action FROM events WHERE client = ?", (client,)).fetchone()
            if earlier is None:
                return self._add(db, found, action, client)
            if earlier != (task, action.model_dump_json()):
                raise Refused("client: this id belongs to another action; expected a new id")
            return fold(self.item(found.item), found, self._events(db, found))

        return self._commits.soon(add)

    def progress(self, labeler: int) -> Progress:
        """Return how far a labeler is."""
        with self._read() as db:
            return progress_of(db, self.config, labeler)

    def judgements(self) -> list[Judgement]:
        """Return the judgements of all finished tasks, in the order in which the tasks were opened."""
        items = {item.number: item for item in self.items()}
        found = []
        with self._read() as db:
            events: dict[int, list[Event]] = {}
            for task, *event in db.execute("SELECT task, number, client, at, action FROM events ORDER BY number"):
                events.setdefault(task, []).append(event_of(event))
            for row in db.execute(f"{TASK} WHERE status != 'open' ORDER BY number"):
                task = task_of(row)
                if task.item in items:  # else it was added since
                    found.append(judgement(items[task.item], task, events.get(task.number, [])))
        return [one for one in found if one is not None]

    # Inside.

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """Yield this thread's connection, in a transaction that sees one moment of the storage.

        Raises:
            DamagedFile: what was read is no content of a storage of labels. RunFailed: it cannot be read now.
        """
        db: sqlite3.Connection | None = getattr(self._threads, "db", None)
        if db is not None and db.in_transaction:
            yield db
            return
        try:
            if db is None:
                db = self._threads.db = connect(self.path)
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("COMMIT")
        except (sqlite3.DatabaseError, ValidationError, json.JSONDecodeError) as error:
            raise unreadable(self.path, error) from error

    def _meta(self, key: str) -> str:
        with self._read() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return "" if row is None else str(row[0])

    def _state(self, db: sqlite3.Connection, task: Task) -> TaskState:
        """The state of a task as a connection sees it."""
        rows = db.execute(f"{EVENT} WHERE task = ? ORDER BY number", (task.number,))
        return fold(self.item(task.item), task, map(event_of, rows))

    # Inside the thread that commits.

    def _events(self, db: sqlite3.Connection, task: Task) -> list[Event]:
        """The events of a task; those that other processes have added are read, the others remembered."""
        events = self._recent.pop(task.number, [])
        last = events[-1].number if events else 0
        rows = db.execute(f"{EVENT} WHERE task = ? AND number > ? ORDER BY number", (task.number, last))
        events += map(event_of, rows)
        self._recent[task.number] = events  # the last in the order of use
        if len(self._recent) > _CACHED:
            del self._recent[next(iter(self._recent))]
        return events

    def _add(self, db: sqlite3.Connection, task: Task, action: Action, client: str) -> TaskState:
        """Check an action, add it, and return the state after it."""
        item, events = self.item(task.item), self._events(db, task)
        before = fold(item, task, events)
        check(item, self.config, before, action)
        now = self.clock()
        events.append(add_event(db, task.number, client, now, action))
        after = fold(item, task, events)
        values = (now, after.status, after.seconds, task.number)
        db.execute("UPDATE tasks SET touched = ?, status = ?, seconds = ? WHERE number = ?", values)
        if task.repeat == 0 and "skipped" in (before.status, after.status) and before.status != after.status:
            # Another labeler gets a skipped item in this one's place.
            change = -1 if after.status == "skipped" else 1
            db.execute("UPDATE items SET taken = taken + ? WHERE number = ?", (change, task.item))
        return after


def _digest(secret: str, token: str | None) -> str:
    whole = secret if token is None else f"{secret} {token}"
    return hashlib.sha256(whole.encode(errors="backslashreplace")).hexdigest()
