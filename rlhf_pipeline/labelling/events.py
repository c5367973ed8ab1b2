"""What the events of a task amount to, and which actions a labeler may take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.errors import BadInput
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
    TaskState,
    UndoAction,
)

PAUSE = 300.0
"""Seconds without an action after which the labeler counts as away: no more of them are counted."""


class Refused(BadInput):
    """An action of a labeler that cannot be."""

    kind = "label"


@dataclass(frozen=True)
class Task:
    """An item before a labeler, from the moment (Unix time) at which it was opened."""

    number: int
    labeler: int
    item: int
    repeat: int
    shown: list[int]
    opened: float


@dataclass(frozen=True)
class Event:
    """An action as it was recorded. client: the unique id that the browser gave the action."""

    number: int
    client: str
    at: float
    action: Action


def fold(item: Item, task: Task, events: Iterable[Event]) -> TaskState:
    """Return the state of a task after its events, in the order of their numbers.

    The actions that are not taken back are a stack: an undo takes off the last one. Time between two events counts if
    the task was open in between, and for at most PAUSE seconds. (Without these, a labeler who reads a long item for six
    minutes before the first action would count as hurried.)
    """
    kept: list[Action] = []
    seconds, before = 0.0, task.opened
    for event in events:
        passed = event.at - before
        if _status(kept) == "open" and passed > 0:
            seconds += min(passed, PAUSE)
        before = event.at
        if not isinstance(event.action, UndoAction):
            kept.append(event.action)
        elif kept:
            kept.pop()
    number = len(item.responses)
    ranks: list[int | None] = [None] * number
    ratings: list[int | None] = [None] * number
    flags: list[dict[str, bool]] = [{} for _ in range(number)]
    note = reason = ""
    for action in kept:
        match action:
            case RankAction():
                ranks = list(action.ranks)
            case RateAction():
                ratings[action.response] = action.value
            case FlagAction(value=None):
                flags[action.response].pop(action.flag, None)
            case FlagAction(value=bool(value)):
                flags[action.response][action.flag] = value
            case NoteAction():
                note = action.text
            case SkipAction():
                reason = action.reason
    return TaskState(
        task=task.number,
        item=task.item,
        repeat=task.repeat,
        shown=task.shown,
        ranks=ranks,
        ratings=ratings,
        flags=flags,
        note=note,
        status=_status(kept),
        reason=reason,
        actions=len(kept),
        seconds=seconds,
    )


def _status(kept: Sequence[Action]) -> Literal["open", "done", "skipped"]:
    """The status after actions that are not taken back: only the last one can end a task."""
    last = kept[-1] if kept else None
    return "done" if isinstance(last, SubmitAction) else "skipped" if isinstance(last, SkipAction) else "open"


def check(item: Item, config: LabelConfig, state: TaskState, action: Action) -> None:
    """Check that a labeler may take an action in this state of the task.

    Raises:
        Refused: the labeler may not.
    """
    number = len(item.responses)
    if isinstance(action, UndoAction):
        if not state.actions:
            raise Refused(f"undo: task {state.task} has no action to take back; expected one")
        return
    if state.status != "open":
        raise Refused(f"{action.kind}: task {state.task} is {state.status}; expected an open task; undo that first")
    if isinstance(action, RateAction | FlagAction) and action.response >= number:
        raise Refused(f"{action.kind}: found response {action.response}; expected 0 to {number - 1}")
    match action:
        case RankAction(ranks=ranks):
            if len(ranks) != number:
                raise Refused(f"rank: found {len(ranks)} ranks; expected {number}, one per response")
            if beyond := [rank for rank in ranks if rank is not None and rank > number]:
                raise Refused(f"rank: found {beyond[0]}; expected 1 to {number}, or null")
        case RateAction(value=int(value)):
            scale = config.scale
            if not scale.lowest <= value <= scale.highest:
                raise Refused(f"rate: found {value}; expected {scale.lowest} to {scale.highest}")
        case FlagAction(flag=flag):
            if flag not in config.flag_keys:
                raise Refused(f"flag: found {flag[:80]!r}; expected one of {', '.join(config.flag_keys) or 'none'}")
        case SubmitAction():
            if missing := state.ranks.count(None):
                raise Refused(f"submit: {missing} of {number} responses have no rank; expected a rank for each")
        case SkipAction(reason=reason):
            if not reason.strip():
                raise Refused("skip: found an empty reason; expected one")


def dense(ranks: Sequence[int]) -> list[int]:
    """Return ranks without gaps: the best is 1, the next lower group is 2, and so on; ties stay ties."""
    order = sorted(set(ranks))
    return [1 + order.index(rank) for rank in ranks]


def judgement(item: Item, task: Task, events: Sequence[Event]) -> Judgement | None:
    """Return the judgement of a finished task; None if it is open."""
    state = fold(item, task, events)
    if state.status == "open":
        return None
    skipped = state.status == "skipped"
    return Judgement(
        labeler=task.labeler,
        item=task.item,
        repeat=task.repeat,
        shown=task.shown,
        ranks=[] if skipped else dense([rank for rank in state.ranks if rank is not None]),
        ratings=state.ratings,
        flags=state.flags,
        note=state.note,
        skipped=skipped,
        reason=state.reason,
        seconds=state.seconds,
        at=events[-1].at,
    )
