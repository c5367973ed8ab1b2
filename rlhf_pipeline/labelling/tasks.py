"""Which item a labeler gets next, and in which order its responses are shown."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Collection, Sequence

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Part

APART = 5
"""Number of other tasks, at least, between an item and its repeat, while there are other items."""
LEASE = 1800.0
"""Seconds without an action after which an open task no longer keeps its item from other labelers."""
_NEW = "FROM items WHERE taken < ? AND number NOT IN (SELECT item FROM tasks WHERE labeler = ?)"


def draw(*parts: object) -> int:
    """Return a whole number below 2**48, uniform and fixed by the parts: the first bits of their SHA-256."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:12], 16)


def shown_order(seed: int, labeler: int, item: int, repeat: int, number: int) -> list[int]:
    """Return the order in which a labeler sees the responses of an item: a permutation of 0 ... number - 1."""
    return sorted(range(number), key=lambda k: draw("shown", seed, labeler, item, repeat, k))


def repeats_due(share: float, firsts: int, given: int) -> int:
    """Return how many repeats a labeler is due: floor(share x items judged once) - repeats given so far, at least 0."""
    return max(0, math.floor(share * firsts + 1e-9) - given)


def repeat_of(
    seed: int, labeler: int, seen: Sequence[int], done: Collection[int], repeated: Collection[int], apart: int
) -> int | None:
    """Return an item for a labeler to judge again; None if there is none.

    seen: the items of the labeler's tasks, in order, repeats among them. done: the items that were judged, not
    skipped. repeated: those judged again already. apart: number of tasks, at least, since the item was seen.
    """
    early = seen[: max(0, len(seen) - apart)]
    late = set(seen[len(early) :])
    found = {item for item in early if item in done and item not in repeated and item not in late}
    return min(found, key=lambda item: draw("repeat", seed, labeler, item), default=None)


def next_task(db: sqlite3.Connection, config: LabelConfig, labeler: int, now: float) -> int | None:
    """Return the labeler's open task, else open the next one: a repeat that is due, or a new item; None: neither."""
    tasks = db.execute(
        "SELECT number, item, repeat, status FROM tasks WHERE labeler = ? ORDER BY number", (labeler,)
    ).fetchall()
    for number, _, _, status in tasks:
        if status == "open":  # two browsers have asked at once
            return int(number)
    seen = [item for _, item, _, _ in tasks]
    done = {item for _, item, repeat, status in tasks if repeat == 0 and status == "done"}
    repeated = {item for _, item, repeat, _ in tasks if repeat == 1}
    due = repeats_due(config.repeat_share, len(done), len(repeated))
    again = repeat_of(config.seed, labeler, seen, done, repeated, APART) if due else None
    item = again if again is not None else _new_item(db, config, labeler, now)
    if item is None and due:
        item = again = repeat_of(config.seed, labeler, seen, done, repeated, 0)
    if item is None:
        return None
    repeat = int(again is not None)
    (responses,) = db.execute("SELECT count(*) FROM responses WHERE item = ?", (item,)).fetchone()
    shown = shown_order(config.seed, labeler, item, repeat, responses)
    insert = "INSERT INTO tasks (labeler, item, repeat, shown, opened, touched) VALUES (?, ?, ?, ?, ?, ?)"
    made = db.execute(insert, (labeler, item, repeat, json.dumps(shown), now, now)).lastrowid
    if not repeat:
        db.execute("UPDATE items SET taken = taken + 1 WHERE number = ?", (item,))
    return made


class Progress(Part):
    """How far a labeler is. left: items that wait for the labeler, the open one and repeats among them.

    seconds_per_item: the mean over finished items; None if there is none.
    """

    done: int
    skipped: int
    left: int
    seconds_per_item: float | None


def progress_of(db: sqlite3.Connection, config: LabelConfig, labeler: int) -> Progress:
    """Return how far a labeler is."""
    count = (
        "SELECT count(*) FILTER (WHERE status = 'done'), count(*) FILTER (WHERE status = 'skipped'), "
        "count(*) FILTER (WHERE status = 'open'), count(*) FILTER (WHERE repeat = 0 AND status != 'skipped'), "
        "count(*) FILTER (WHERE repeat = 1), avg(seconds) FILTER (WHERE status = 'done') FROM tasks WHERE labeler = ?"
    )
    done, skipped, still_open, firsts, repeats, seconds = db.execute(count, (labeler,)).fetchone()
    new = _count_new(db, config, labeler)
    due = repeats_due(config.repeat_share, firsts + new, repeats)
    return Progress(done=done, skipped=skipped, left=still_open + new + due, seconds_per_item=seconds)


def _count_new(db: sqlite3.Connection, config: LabelConfig, labeler: int) -> int:
    """The number of items that the labeler has not seen and that too few labelers have."""
    (free,) = db.execute("SELECT value FROM meta WHERE key = 'free'").fetchone()
    own = "SELECT count(*) FROM tasks JOIN items ON items.number = item WHERE labeler = ? AND repeat = 0 AND taken < ?"
    (seen,) = db.execute(own, (labeler, config.overlap)).fetchone()
    return int(free) - int(seen)


def _new_item(db: sqlite3.Connection, config: LabelConfig, labeler: int, now: float) -> int | None:
    """The next item that the labeler has not seen and that too few labelers have; None if there is none.

    An item that others have opened and left counts as free if there is no other.
    """
    row = db.execute(f"SELECT number {_NEW} ORDER BY place, number LIMIT 1", (config.overlap, labeler)).fetchone()
    if row is None:
        left = (
            "SELECT number FROM items WHERE number NOT IN (SELECT item FROM tasks WHERE labeler = ?) AND "
            "(SELECT count(*) FROM tasks WHERE item = items.number AND repeat = 0 AND "
            "(status = 'done' OR (status = 'open' AND touched > ?))) < ? ORDER BY place, number LIMIT 1"
        )
        row = db.execute(left, (labeler, now - LEASE, config.overlap)).fetchone()
    return None if row is None else int(row[0])
