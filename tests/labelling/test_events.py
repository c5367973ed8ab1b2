"""What the events of a task amount to, by hand."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.events import Event, Refused, Task, check, dense, fold, judgement
from rlhf_pipeline.labelling.kinds import (
    Action,
    FlagAction,
    Item,
    NoteAction,
    RankAction,
    RateAction,
    Response,
    SkipAction,
    SubmitAction,
    UndoAction,
)

ITEM = Item(number=7, prompt="p", responses=[Response(text=text) for text in "abc"])
TASK = Task(number=3, labeler=2, item=7, repeat=1, shown=[2, 0, 1], opened=100.0)
CONFIG = LabelConfig(policies=("a",), prompts="p")


def events(*pairs: tuple[float, Action]) -> list[Event]:
    return [Event(number, f"c{number}", at, action) for number, (at, action) in enumerate(pairs, start=1)]


def test_a_fold_keeps_the_last_of_each_kind() -> None:
    state = fold(
        ITEM,
        TASK,
        events(
            (101.0, RankAction(ranks=[1, None, 2])),
            (102.0, RateAction(response=0, value=4)),
            (103.0, RateAction(response=0, value=6)),
            (104.0, FlagAction(response=2, flag="opinion", value=True)),
            (105.0, FlagAction(response=1, flag="sexual", value=False)),
            (106.0, FlagAction(response=2, flag="opinion", value=None)),
            (107.0, NoteAction(text="n")),
            (108.0, RankAction(ranks=[2, 2, 1])),
        ),
    )
    assert (state.task, state.item, state.repeat, state.shown) == (3, 7, 1, [2, 0, 1])
    assert state.ranks == [2, 2, 1]
    assert state.ratings == [6, None, None]
    assert state.flags == [{}, {"sexual": False}, {}]
    assert (state.note, state.status, state.reason, state.actions, state.seconds) == ("n", "open", "", 8, 8.0)


def test_undo_takes_back_the_last_action_that_stands() -> None:
    first, second = RankAction(ranks=[1, 2, 3]), RankAction(ranks=[3, 2, 1])
    steps = [(101.0, first), (102.0, second), (103.0, UndoAction()), (104.0, NoteAction(text="n"))]
    assert fold(ITEM, TASK, events(*steps)).ranks == [1, 2, 3]
    steps += [(105.0, UndoAction()), (106.0, UndoAction())]  # the note, then the first rank
    after = fold(ITEM, TASK, events(*steps))
    assert (after.ranks, after.note, after.actions) == ([None] * 3, "", 0)
    done = [(101.0, first), (102.0, SubmitAction())]
    assert fold(ITEM, TASK, events(*done)).status == "done"
    assert fold(ITEM, TASK, events(*done, (103.0, UndoAction()))).status == "open"
    skipped = fold(ITEM, TASK, events((101.0, SkipAction(reason="why"))))
    assert (skipped.status, skipped.reason) == ("skipped", "why")


def test_time_counts_while_the_task_is_open_and_without_pauses() -> None:
    note = NoteAction(text="")
    # 10 s, a pause of 301 s (of which 300 count), 300 s, then an hour after the submit, 5 s after the undo.
    steps = [(110.0, note), (411.0, note), (711.0, SubmitAction()), (721.0, UndoAction()), (726.0, note)]
    assert fold(ITEM, TASK, events(*steps)).seconds == 10 + 300 + 300 + 5
    assert fold(ITEM, TASK, events((90.0, note))).seconds == 0  # the clock was set back


REFUSED: list[tuple[list[Action], Action]] = [
    ([], RankAction(ranks=[1, 2])),
    ([], RankAction(ranks=[1, 2, 3, 3])),
    ([], RankAction(ranks=[1, 2, 4])),
    ([], RateAction(response=3, value=1)),
    ([], RateAction(response=0, value=0)),
    ([], RateAction(response=0, value=8)),
    ([], FlagAction(response=3, flag="opinion", value=True)),
    ([], FlagAction(response=0, flag="opinions", value=True)),
    ([], SubmitAction()),
    ([RankAction(ranks=[1, None, 2])], SubmitAction()),
    ([], SkipAction(reason=" \n")),
    ([], UndoAction()),
    ([NoteAction(text="n"), UndoAction()], UndoAction()),
    ([RankAction(ranks=[1, 1, 1]), SubmitAction()], NoteAction(text="n")),
    ([RankAction(ranks=[1, 1, 1]), SubmitAction()], SubmitAction()),
    ([SkipAction(reason="why")], RankAction(ranks=[1, 1, 1])),
]
ACCEPTED: list[tuple[list[Action], Action]] = [
    ([], RankAction(ranks=[1, 3, 3])),
    ([], RankAction(ranks=[None, None, 1])),
    ([], RateAction(response=2, value=1)),
    ([], RateAction(response=2, value=7)),
    ([], RateAction(response=2, value=None)),
    ([], FlagAction(response=2, flag="moral_judgement", value=False)),
    ([RankAction(ranks=[1, 1, 1])], SubmitAction()),
    ([], SkipAction(reason="why")),
    ([SkipAction(reason="why")], UndoAction()),
]


def test_what_a_labeler_may_do() -> None:
    for before, action in REFUSED:
        state = fold(ITEM, TASK, events(*((101.0, one) for one in before)))
        with pytest.raises(Refused):
            check(ITEM, CONFIG, state, action)
            pytest.fail(f"{action} after {before}")
    for before, action in ACCEPTED:
        check(ITEM, CONFIG, fold(ITEM, TASK, events(*((101.0, one) for one in before))), action)


def test_dense_ranks_and_judgements() -> None:
    assert dense([3, 1, 3, 2]) == [3, 1, 3, 2]
    assert dense([9, 4, 9]) == [2, 1, 2]
    assert dense([1, 1, 3]) == [1, 1, 2]
    assert judgement(ITEM, TASK, events((101.0, NoteAction(text="n")))) is None
    steps = [(101.0, RankAction(ranks=[3, 1, 3])), (105.0, SubmitAction())]
    done = judgement(ITEM, TASK, events(*steps))
    assert done is not None
    assert (done.labeler, done.item, done.repeat, done.shown) == (2, 7, 1, [2, 0, 1])
    assert (done.ranks, done.skipped, done.seconds, done.at) == ([2, 1, 2], False, 5.0, 105.0)
    left = judgement(ITEM, TASK, events((101.0, RankAction(ranks=[3, 1, 3])), (102.0, SkipAction(reason="why"))))
    assert left is not None
    assert (left.ranks, left.skipped, left.reason) == ([], True, "why")
