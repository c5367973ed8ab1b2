"""Rows of a labelling project's database as items, tasks and events, and back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.events import Event, Refused, Task
from rlhf_pipeline.labelling.kinds import Action, Item
from rlhf_pipeline.labelling.tasks import draw

TASK = "SELECT number, labeler, item, repeat, shown, opened FROM tasks"
EVENT = "SELECT number, client, at, action FROM events"
_ACTION: TypeAdapter[Action] = TypeAdapter(Action)


def task_of(row: Sequence[Any]) -> Task:
    """Return the task of a row of TASK."""
    number, labeler, item, repeat, shown, opened = row
    return Task(number, labeler, item, repeat, json.loads(shown), opened)


def event_of(row: Sequence[Any]) -> Event:
    """Return the event of a row of EVENT."""
    number, client, at, action = row
    return Event(number, client, at, _ACTION.validate_json(action))


def find_task(db: sqlite3.Connection, number: int, labeler: int | None = None) -> Task:
    """Return a task, of this labeler if one is given.

    Raises:
        Refused: there is no such task, or it is another labeler's.
    """
    row = db.execute(f"{TASK} WHERE number = ?", (number,)).fetchone()
    if row is None or (labeler is not None and row[1] != labeler):
        raise Refused(f"task {number}: found no such task of this labeler; expected one of the labeler's own")
    return task_of(row)


def read_items(db: sqlite3.Connection, numbers: Iterable[int]) -> Iterator[Item]:
    """Yield the items of these numbers that are there."""
    for number in numbers:
        row = db.execute("SELECT body FROM items WHERE number = ?", (number,)).fetchone()
        if row is not None:
            responses = db.execute("SELECT body FROM responses WHERE item = ? ORDER BY number", (number,))
            texts = [json.loads(body) for (body,) in responses]
            yield Item.model_validate(json.loads(row[0]) | {"number": number, "responses": texts})


def add_items(
    db: sqlite3.Connection, config: LabelConfig, items: Sequence[Item], uncertainty: Sequence[float] | None, first: int
) -> None:
    """Write items, numbered from `first` on.

    Those with the highest uncertainty come first; without uncertainty, the order is by hash.

    Raises:
        BadInput: the numbers are others.
    """
    if [item.number for item in items] != list(range(first, first + len(items))):
        raise BadInput(f"labelling project: found items numbered otherwise; expected {first}, {first + 1}, ...")
    if uncertainty is None:
        places = [float(draw("place", config.seed, item.number)) for item in items]
    else:
        places = [-value for value in uncertainty]
    for item, place in zip(items, places, strict=True):
        body = item.model_dump_json(exclude={"number", "responses"})
        db.execute("INSERT INTO items (number, place, body) VALUES (?, ?, ?)", (item.number, place, body))
        rows = [(item.number, k, response.model_dump_json()) for k, response in enumerate(item.responses)]
        db.executemany("INSERT INTO responses VALUES (?, ?, ?)", rows)


def add_event(db: sqlite3.Connection, task: int, client: str, at: float, action: Action) -> Event:
    """Write an event, and return it."""
    values = (task, client, at, action.model_dump_json())
    number = db.execute("INSERT INTO events (task, client, at, action) VALUES (?, ?, ?, ?)", values).lastrowid
    assert number is not None
    return Event(number, client, at, action)
