"""A labelling project from a project file of Argilla or Label Studio, with the judgements in it."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.commits import connect
from rlhf_pipeline.labelling.events import PAUSE, fold
from rlhf_pipeline.labelling.kinds import (
    Action,
    FlagAction,
    Item,
    Judgement,
    NoteAction,
    RankAction,
    RateAction,
    SkipAction,
    SubmitAction,
)
from rlhf_pipeline.labelling.rows import add_event, find_task
from rlhf_pipeline.labelling.store import LabelStore, database
from rlhf_pipeline.labelling.tools.argilla import read_argilla
from rlhf_pipeline.labelling.tools.argilla_files import is_project
from rlhf_pipeline.labelling.tools.form import Form, Imported
from rlhf_pipeline.labelling.tools.label_studio import read_label_studio

Tool = Literal["argilla", "label-studio"]
GRADES = 11
"""The most grades that a scale has here."""


@dataclass(frozen=True)
class _Task:
    """A judgement of the file as it goes into the project."""

    item: Item
    labeler: int
    repeat: int
    judgement: Judgement


def form_of(config: LabelConfig) -> Form:
    """Return what a project asks."""
    flags = {flag.key: flag.text for flag in config.flags}
    scale = {"lowest": config.scale.lowest, "highest": config.scale.highest}
    return Form(name=config.name, flags=flags, instructions=config.instructions, **scale)


def read_project(path: Path, tool: Tool | None = None, interface: Path | None = None) -> Imported:
    """Read a project of another tool.

    Args:
        tool: whose it is; default: Argilla's where its settings are there, else Label Studio's.
        interface: the labelling interface of Label Studio, where it is not beside the tasks.

    Raises:
        BadInput, DataError: there is no such project, or it has no item.
    """
    if not path.exists():
        raise BadInput(f"{path}: there is no such file or folder; expected a project of Argilla or Label Studio")
    tool = tool or ("argilla" if is_project(path) else "label-studio")
    found = read_argilla(path) if tool == "argilla" else read_label_studio(path, interface)
    if not found.items:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found.lost.items())
        raise BadInput(
            f"{path}: found no item{f' ({reasons})' if reasons else ''}; expected prompts with two responses"
        )
    return found


def make_project(name: str, path: Path, home: Path, found: Imported) -> LabelStore:
    """Make a labelling project of what was read; `found.lost` then also counts what the project has no place for.

    Raises:
        BadInput: there is a project of this name already, or a value of the file cannot be one of a project.
    """
    numbers = {item.number: number for number, item in enumerate(found.items)}
    items = [item.model_copy(update={"number": number}) for number, item in enumerate(found.items)]
    moved = [judgement.model_copy(update={"item": numbers[judgement.item]}) for judgement in found.judgements]
    judgements = _with_grades(moved, found)
    config = _config(name, path, found.form, items, judgements)
    if database(home, name).is_file():
        raise BadInput(f"{database(home, name)}: there is a labelling project already; expected a new name (--name)")
    store = LabelStore.create(database(home, name), config, items)
    tasks = list(_tasks(store, items, judgements, found))
    with contextlib.closing(connect(store.path)) as db:
        db.execute("BEGIN IMMEDIATE")
        for task in tasks:
            _add(db, task, found)
        db.execute("COMMIT")
    return store


def _with_grades(judgements: Sequence[Judgement], found: Imported) -> list[Judgement]:
    """Return the judgements, without grades where there are too many different ones; the form gets the scale of all."""
    grades = [grade for judgement in judgements for grade in judgement.ratings if grade is not None]
    lowest, highest = min([found.form.lowest, *grades]), max([found.form.highest, *grades])
    if lowest >= 0 and highest - lowest < GRADES and highest <= 100 and lowest < highest:
        found.form = found.form.model_copy(update={"lowest": lowest, "highest": highest})
        return list(judgements)
    found.lost[f"grades from {lowest} to {highest}: a scale has at most {GRADES}, from 0 on"] += len(grades)
    found.form = found.form.model_copy(update={"lowest": 1, "highest": 7})
    return [one.model_copy(update={"ratings": [None] * len(one.ratings)}) for one in judgements]


def _config(name: str, path: Path, form: Form, items: Sequence[Item], judgements: Sequence[Judgement]) -> LabelConfig:
    labelers: dict[int, set[int]] = {}
    for judgement in judgements:
        labelers.setdefault(judgement.item, set()).add(judgement.labeler)
    values = {
        "name": name,
        "responses": str(path),
        "num": len(items),
        "overlap": max(map(len, labelers.values()), default=1),
        "scale": {"lowest": form.lowest, "highest": form.highest},
        "flags": [{"key": key, "text": text.strip() or key} for key, text in form.flags.items()],
    }
    values |= {"instructions": form.instructions} if form.instructions.strip() else {}
    return load_config("label", None, extra=values).of(LabelConfig)


def _tasks(store: LabelStore, items: Sequence[Item], judgements: Sequence[Judgement], found: Imported) -> list[_Task]:
    """Return the tasks of all judgements; a second judgement of an item is a repeat, and a third has no place."""
    labelers = sorted({judgement.labeler for judgement in judgements})
    named = {number: store.labeler(f"labeler {place}") for place, number in enumerate(labelers, start=1)}
    taken: set[tuple[int, int, int]] = set()
    tasks = []
    for judgement in judgements:
        labeler = named[judgement.labeler]
        free = [repeat for repeat in (0, 1) if (labeler, judgement.item, repeat) not in taken]
        if not free:
            found.lost["third judgements of an item by one labeler"] += 1
            continue
        taken.add((labeler, judgement.item, free[0]))
        tasks.append(_Task(items[judgement.item], labeler, free[0], judgement))
    return tasks


def _add(db: sqlite3.Connection, task: _Task, found: Imported) -> None:
    """Record a judgement as a task with its actions, which end now and began so long ago as the labeler took."""
    judgement, now = task.judgement, time.time()
    took = judgement.seconds if judgement.seconds <= PAUSE else 0.0
    found.lost[f"times over {PAUSE:g} seconds on an item"] += judgement.seconds > PAUSE
    values = (task.labeler, task.item.number, task.repeat, str(judgement.shown), now - took, now)
    number = db.execute(
        "INSERT INTO tasks (labeler, item, repeat, shown, opened, touched) VALUES (?, ?, ?, ?, ?, ?)", values
    ).lastrowid
    assert number is not None
    events = [
        add_event(db, number, f"import-{number}-{place}", now, action)
        for place, action in enumerate(_actions(judgement))
    ]
    state = fold(task.item, find_task(db, number), events)
    db.execute("UPDATE tasks SET status = ?, seconds = ? WHERE number = ?", (state.status, state.seconds, number))
    if task.repeat == 0 and not judgement.skipped:
        db.execute("UPDATE items SET taken = taken + 1 WHERE number = ?", (task.item.number,))


def _actions(judgement: Judgement) -> list[Action]:
    actions: list[Action] = []
    if judgement.ranks:
        actions.append(RankAction(ranks=[*judgement.ranks]))
    for k, rating in enumerate(judgement.ratings):
        if rating is not None:
            actions.append(RateAction(response=k, value=rating))
    for k, flags in enumerate(judgement.flags):
        actions += [FlagAction(response=k, flag=name, value=answer) for name, answer in flags.items()]
    if judgement.note:
        actions.append(NoteAction(text=judgement.note))
    return [*actions, SkipAction(reason=judgement.reason) if judgement.skipped else SubmitAction()]
