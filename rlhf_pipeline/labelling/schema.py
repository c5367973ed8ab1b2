"""The tables of a labelling project's database, and how the file is made."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import uuid
from collections.abc import Sequence
from pathlib import Path

from rlhf_pipeline.config.labelling import SERVING, LabelConfig
from rlhf_pipeline.config.names import NAME_RULE, is_name
from rlhf_pipeline.disk.storage import sync, writing
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.kinds import Item
from rlhf_pipeline.labelling.origins import Origin
from rlhf_pipeline.labelling.rows import add_items

VERSION = "1"

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    place REAL NOT NULL,                -- items are given out in this order
    body TEXT NOT NULL,
    taken INTEGER NOT NULL DEFAULT 0    -- first tasks of the item that are open or done
);
CREATE TRIGGER items_come AFTER INSERT ON items BEGIN
    UPDATE meta SET value = value + (NEW.taken < (SELECT value FROM meta WHERE key = 'overlap')) WHERE key = 'free';
END;
CREATE TRIGGER items_go AFTER UPDATE OF taken ON items BEGIN
    UPDATE meta SET value = value + (NEW.taken < (SELECT value FROM meta WHERE key = 'overlap'))
        - (OLD.taken < (SELECT value FROM meta WHERE key = 'overlap')) WHERE key = 'free';
END;
CREATE INDEX items_taken ON items (taken, place, number);
CREATE TABLE responses (
    item INTEGER NOT NULL REFERENCES items (number),
    number INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (item, number)
) WITHOUT ROWID;
CREATE TABLE labelers (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, name TEXT NOT NULL);
CREATE TABLE sessions (digest TEXT PRIMARY KEY, labeler INTEGER NOT NULL REFERENCES labelers (number)) WITHOUT ROWID;
CREATE TABLE tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    labeler INTEGER NOT NULL REFERENCES labelers (number),
    item INTEGER NOT NULL REFERENCES items (number),
    repeat INTEGER NOT NULL,
    shown TEXT NOT NULL,
    opened REAL NOT NULL,
    touched REAL NOT NULL,              -- time of the last event
    status TEXT NOT NULL DEFAULT 'open',
    seconds REAL NOT NULL DEFAULT 0,
    UNIQUE (labeler, item, repeat)
);
CREATE INDEX tasks_of_labeler ON tasks (labeler, status, number);
CREATE INDEX tasks_of_item ON tasks (item, repeat);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    task INTEGER NOT NULL REFERENCES tasks (number),
    client TEXT NOT NULL UNIQUE,
    at REAL NOT NULL,
    action TEXT NOT NULL
);
CREATE INDEX events_of_task ON events (task, number);
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'an event cannot be changed'); END;
CREATE TRIGGER events_remain BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'an event cannot be removed'); END;
"""
"""`free` of `meta` is the number of items that fewer than `overlap` labelers have. It, `items.taken`, `tasks.touched`,
`tasks.status` and `tasks.seconds` follow from the events and are written with them."""


def database(home: Path, name: str) -> Path:
    """Return the file of the labelling project of this name.

    Raises:
        BadInput: there can be no project of this name.
    """
    if not is_name(name):
        raise BadInput(f"labelling project: found the name {name!r}; expected {NAME_RULE}")
    return home / "labels" / name / "labels.sqlite"


def make(
    path: Path, config: LabelConfig, items: Sequence[Item], uncertainty: Sequence[float] | None, origin: Origin
) -> None:
    """Write the file of a new project beside its place, and put it there when it is whole.

    Raises:
        BadInput: there is a project already, or the items are not numbered from 0. RunFailed: the disk is full.
    """
    new = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
    with writing(path, "a labelling project"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db:
                db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; BEGIN; {TABLES}")
                kept = config.model_dump_json(exclude=set(SERVING))
                rows: list[tuple[str, str | int]] = [
                    ("version", VERSION),
                    ("config", kept),
                    ("origin", origin.model_dump_json()),
                ]
                rows += [("overlap", config.overlap), ("free", 0)]
                db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                add_items(db, config, items, uncertainty, 0)
                db.execute("COMMIT")
            sync(new)
            try:
                os.link(new, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                if path.exists():
                    raise FileExistsError(path) from None
                os.rename(new, path)
            sync(path.parent)
        except FileExistsError:
            raise BadInput(f"{path}: there is a labelling project already; expected a new name") from None
        finally:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{new}{suffix}").unlink(missing_ok=True)
