"""The storage of a labelling project: nothing lost, nothing twice, everyone in turn."""

from __future__ import annotations

import contextlib
import math
import random
import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest

from rlhf_pipeline.config.labelling import LabelConfig, differing
from rlhf_pipeline.errors import BadInput, DamagedFile, RunFailed
from rlhf_pipeline.labelling.kinds import (
    Item,
    NoteAction,
    RankAction,
    RateAction,
    Response,
    SkipAction,
    SubmitAction,
    TaskState,
    UndoAction,
)
from rlhf_pipeline.labelling.store import LabelStore, Refused, database
from rlhf_pipeline.labelling.tasks import draw

RANK = RankAction(ranks=[2, 1, 2])


def items(number: int, first: int = 0) -> list[Item]:
    return [
        Item(
            number=n,
            prompt=[{"role": "user", "content": f"prompt {n}"}],
            responses=[Response(text=f"{n} {k}", source=f"m{k}", ids=[n, k], ended=k > 0) for k in range(3)],
            split="train",
            columns={"prompt_ids": [n]},
        )
        for n in range(first, first + number)
    ]


def made(tmp_path: Path, number: int, **keys: object) -> LabelStore:
    config = LabelConfig.model_validate({"policies": ["m0"], "prompts": "p", **keys})
    return LabelStore.create(database(tmp_path, "labels"), config, items(number))


def finish(store: LabelStore, labeler: int, *, skip: bool = False) -> TaskState:
    task = store.task(labeler)
    assert task is not None
    if skip:
        return store.record(labeler, task.task, SkipAction(reason="why"), f"s{task.task}")
    store.record(labeler, task.task, RANK, f"r{task.task}")
    return store.record(labeler, task.task, SubmitAction(), f"d{task.task}")


def test_a_project_is_read_as_it_was_made(tmp_path: Path) -> None:
    with made(tmp_path, 4, overlap=2, token="secret", host="0.0.0.0") as store:
        assert store.items() == items(4)
        assert store.extend(items(2), "b") == [4, 5] == store.extend(items(2), "b")
    path = tmp_path / "labels" / "labels" / "labels.sqlite"
    assert b"secret" not in path.read_bytes()
    with LabelStore.open(path) as again:
        assert again.items()[4:] == items(2, 4)[:0] + [
            item.model_copy(update={"number": n}) for n, item in zip((4, 5), items(2), strict=True)
        ]
        assert again.config.overlap == 2
        assert differing(again.config, LabelConfig(policies=("m0",), prompts="p", overlap=3)) == ["overlap"]
        with pytest.raises(BadInput, match="already"):
            LabelStore.create(path, again.config, items(1))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".tmp"] == []


def test_what_is_no_project_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    with pytest.raises(BadInput, match="no labelling project"):
        LabelStore.open(path)
    assert not path.exists()
    path.write_bytes(b"x" * 5000)
    with pytest.raises(DamagedFile):
        LabelStore.open(path)
    for name in ("..", "a/b", "", "a" * 65):
        with pytest.raises(BadInput):
            database(tmp_path, name)
    with pytest.raises(BadInput, match="numbered"):
        LabelStore.create(tmp_path / "new.sqlite", LabelConfig(policies=("m",), prompts="p"), items(2, 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["labels.sqlite"]


def test_an_action_is_recorded_once_and_by_its_labeler(tmp_path: Path) -> None:
    with made(tmp_path, 3) as store, LabelStore.open(store.path) as other:
        ann, bob = store.labeler(" Ann "), store.labeler("Bob")
        assert store.labeler("ann") == ann != bob
        assert (store.labelers(), store.name(ann)) == ([ann, bob], "Ann")
        task = store.task(ann)
        assert task is not None
        assert store.task(ann) == other.task(ann) == task
        number = task.task
        first = store.record(ann, number, RANK, "c1")
        assert first.ranks == [2, 1, 2]
        assert other.record(ann, number, RateAction(response=0, value=3), "c2").actions == 2
        assert store.record(ann, number, RANK, "c1").actions == 2  # sent again: the state of now, nothing new
        for client, action in (("c1", NoteAction(text="n")), ("", RANK), ("a b", RANK), ("x" * 65, RANK)):
            with pytest.raises(Refused, match="client"):
                store.record(ann, number, action, client)
        for labeler, wanted in ((bob, number), (ann, 99)):
            with pytest.raises(Refused, match="no such task"):
                store.record(labeler, wanted, RANK, "c3")
            with pytest.raises(Refused, match="no such task"):
                store.back(labeler, wanted)
        with pytest.raises(Refused, match="expected 1 to 7"):
            store.record(ann, number, RateAction(response=0, value=9), "c3")
        done = store.record(ann, number, SubmitAction(), "c3")
        assert store.record(ann, number, SubmitAction(), "c3") == done  # the retry of a submit is no fault
        assert store.state(number) == done
        events = sqlite3.connect(store.path).execute("SELECT client FROM events ORDER BY number").fetchall()
        assert events == [("c1",), ("c2",), ("c3",)]
        raw = sqlite3.connect(store.path, isolation_level=None)
        for change in ("DELETE FROM events", "UPDATE events SET at = 0"):
            with pytest.raises(sqlite3.IntegrityError):
                raw.execute(change)


def test_names_that_cannot_be(tmp_path: Path) -> None:
    with made(tmp_path, 1) as store:
        for name in ("", "  ", "x" * 65, "a\x00b", "a\u202eb"):
            with pytest.raises(Refused):
                store.labeler(name)
        assert store.labeler("José") == store.labeler("JOSE\u0301")
        secret = store.new_session(store.labeler("José"))
        assert (store.session(secret), store.session("other"), store.session("\ud800")) == (1, None, None)
    assert secret.encode() not in store.path.read_bytes()


def test_back_opens_an_earlier_task_and_undo_takes_back(tmp_path: Path) -> None:
    with made(tmp_path, 3) as store:
        ann = store.labeler("Ann")
        first = finish(store, ann)
        second = finish(store, ann, skip=True)
        third = store.task(ann)
        assert third is not None
        assert [store.previous(ann, number) for number in (third.task, second.task, first.task)] == [
            second.task,
            first.task,
            None,
        ]
        opened = store.back(ann, first.task)
        assert (opened.status, opened.ranks, opened.actions) == ("open", [2, 1, 2], 1)
        assert store.back(ann, first.task) == opened  # open already: nothing more is taken back
        assert store.task(ann) == opened  # also after a reload
        store.record(ann, first.task, RankAction(ranks=[1, 1, 1]), "again")
        store.record(ann, first.task, SubmitAction(), "again2")
        assert store.task(ann) == third
        assert store.record(ann, second.task, UndoAction(), "u").status == "open"
        assert [(one.item, one.ranks) for one in store.judgements()] == [(first.item, [1, 1, 1])]


@pytest.mark.check
def test_items_are_given_to_as_many_labelers_as_wanted(tmp_path: Path) -> None:
    with made(tmp_path, 12, overlap=2, seed=5) as store:
        labelers = [store.labeler(name) for name in ("a", "b", "c")]
        assert store.progress(1).left == 12
        order: list[int] = []
        while any(store.task(labeler) for labeler in labelers):
            for labeler in labelers:
                if store.task(labeler):
                    done = finish(store, labeler)
                    order += [done.item] if labeler == 1 else []
        judged = store.judgements()
        assert len(judged) == 24
        assert set(Counter(one.item for one in judged).values()) == {2}
        assert len({(one.item, one.labeler) for one in judged}) == 24
        by_hash = sorted(range(12), key=lambda n: draw("place", 5, n))
        assert [item for item in by_hash if item in order] == order
        for labeler in labelers:
            assert (store.progress(labeler).left, store.progress(labeler).done) == (0, 8)
        assert any(one.shown != [0, 1, 2] for one in judged)
        assert all(sorted(one.shown) == [0, 1, 2] for one in judged)


def test_a_skipped_item_goes_to_another_labeler_and_counts_again_when_it_is_opened(tmp_path: Path) -> None:
    with made(tmp_path, 1) as store:
        ann, bob, cid = (store.labeler(name) for name in ("Ann", "Bob", "Cid"))
        skipped = finish(store, ann, skip=True)
        assert store.task(ann) is None
        assert store.progress(ann).skipped == 1
        assert store.progress(bob).left == 1
        taken = store.task(bob)
        assert taken is not None
        assert store.task(cid) is None
        store.back(ann, skipped.task)
        store.record(bob, taken.task, SkipAction(reason="why"), "b")
        assert store.task(cid) is None  # Ann has it again
        store.record(ann, skipped.task, SkipAction(reason="why"), "a")
        assert store.task(cid) is not None


def test_an_item_that_was_left_open_goes_to_another_labeler(tmp_path: Path) -> None:
    now = 1000.0
    with made(tmp_path, 1) as store:
        store.clock = lambda: now
        ann, bob = store.labeler("Ann"), store.labeler("Bob")
        mine = store.task(ann)
        assert store.task(bob) is None
        now += 1801
        assert store.task(bob) is not None
        assert store.task(ann) == mine


@pytest.mark.check
def test_items_come_again_for_self_consistency(tmp_path: Path) -> None:
    with made(tmp_path, 20, repeat_share=0.25) as store:
        ann = store.labeler("Ann")
        assert store.progress(ann).left == 25
        seen: list[tuple[int, int]] = []
        while store.task(ann):
            done = finish(store, ann)
            seen.append((done.item, done.repeat))
            assert store.progress(ann).left == 25 - len(seen)
        assert Counter(repeat for _, repeat in seen) == {0: 20, 1: 5}
        for place, (item, repeat) in enumerate(seen):
            if repeat:
                assert place - seen.index((item, 0)) > 5
        shown = {(one.item, one.repeat): one.shown for one in store.judgements()}
        assert any(shown[item, 0] != shown[item, 1] for item, repeat in shown if repeat)
    with made(tmp_path / "few", 2, repeat_share=1) as few:  # too few to stand apart: at the end
        one = few.labeler("Ann")
        found = [(finish(few, one).item, n) for n in range(4)]
        assert few.task(one) is None
        assert [item for item, _ in found[2:]] != []


def test_the_most_uncertain_items_come_first(tmp_path: Path) -> None:
    config = LabelConfig(policies=("m",), prompts="p", order="uncertain", reward_model="world")
    with LabelStore.create(tmp_path / "l.sqlite", config, items(4), uncertainty=[0.2, 0.9, 0.2, 0.5]) as store:
        ann = store.labeler("Ann")
        assert [finish(store, ann).item for _ in range(4)] == [1, 3, 0, 2]


def test_time_of_an_item(tmp_path: Path) -> None:
    now = 50.0
    with made(tmp_path, 2) as store:
        store.clock = lambda: now
        ann = store.labeler("Ann")
        assert store.progress(ann).seconds_per_item is None
        task = store.task(ann)
        assert task is not None
        now = 60.0
        store.record(ann, task.task, RANK, "r")
        now = 65.0
        store.record(ann, task.task, SubmitAction(), "d")
        assert store.progress(ann).seconds_per_item == 15.0
        (one,) = store.judgements()
        assert (one.seconds, one.at) == (15.0, 65.0)


@pytest.mark.check
def test_threads_and_two_storages_of_one_file_lose_nothing(tmp_path: Path) -> None:
    with made(tmp_path, 8, overlap=8) as store, LabelStore.open(store.path) as other:
        failed: list[BaseException] = []

        def work(store: LabelStore, name: str) -> None:
            try:
                labeler = store.labeler(name)
                while task := store.task(labeler):
                    for n in range(5):
                        store.record(labeler, task.task, NoteAction(text=str(n)), f"{name}-{task.task}-{n}")
                    finish(store, labeler)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=((store, other)[n % 2], f"l{n}")) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        judged = store.judgements()
        assert len(judged) == 64
        assert {one.note for one in judged} == {"4"}
        db = sqlite3.connect(store.path)
        assert db.execute("SELECT count(*), count(DISTINCT client) FROM events").fetchone() == (64 * 7, 64 * 7)
        # What is kept beside the events agrees with them.
        assert db.execute("SELECT DISTINCT taken FROM items").fetchall() == [(8,)]
        for number, status, seconds in db.execute("SELECT number, status, seconds FROM tasks").fetchall():
            state = other.state(number)
            assert (state.status, state.seconds) == (status, seconds)


def test_a_write_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    with made(tmp_path, 2) as store:
        ann = store.labeler("Ann")
        task = store.task(ann)
        assert task is not None
        held = threading.Event()
        store._commits.soon(lambda db: held.wait() and None)  # those that follow share a commit
        good = store.record_soon(ann, task.task, RANK, "c1")
        refused = store.record_soon(ann, task.task, RankAction(ranks=[9, 9, 9]), "c2")
        nobody = store._commits.soon(lambda db: db.execute("INSERT INTO sessions VALUES ('x', 999)"))
        late = store.record_soon(ann, task.task, NoteAction(text="n"), "c3")
        held.set()
        assert isinstance(nobody.exception(), sqlite3.IntegrityError)
        assert isinstance(refused.exception(), Refused)
        assert (good.result().ranks, late.result().note) == ([2, 1, 2], "n")
    with pytest.raises(RunFailed, match="closed"):
        store.record(ann, task.task, RANK, "c4")


def test_nothing_is_acknowledged_that_could_not_be_committed(tmp_path: Path) -> None:
    with made(tmp_path, 2) as store:
        ann = store.labeler("Ann")
        task = store.task(ann)
        assert task is not None
        store.record(ann, task.task, RANK, "c1")
        store._commits.do(lambda db: db.execute("PRAGMA max_page_count = 1") and None)  # the disk is full
        with pytest.raises(RunFailed, match="full"):
            store.record(ann, task.task, NoteAction(text="n" * 4000), "c2")
        assert store.state(task.task).actions == 1
        store._commits.do(lambda db: db.execute("PRAGMA max_page_count = 1000000") and None)
        assert store.record(ann, task.task, NoteAction(text="n" * 4000), "c2").actions == 2


@pytest.mark.check
def test_what_is_kept_beside_the_events_agrees_with_a_recount(tmp_path: Path) -> None:
    draw = random.Random(3)
    with made(tmp_path, 9, overlap=2, repeat_share=0.3) as store:
        labelers = [store.labeler(name) for name in "abcd"]
        db = sqlite3.connect(store.path)
        for step in range(120):
            labeler = draw.choice(labelers)
            task = store.task(labeler)
            if task is not None and draw.random() < 0.9:
                chosen = draw.choice([NoteAction(text="n"), SkipAction(reason="why"), RANK, RANK])
                store.record(labeler, task.task, chosen, f"a{step}")
                if chosen is RANK:
                    store.record(labeler, task.task, SubmitAction(), f"b{step}")
            elif own := [n for (n,) in db.execute("SELECT number FROM tasks WHERE labeler = ?", (labeler,))]:
                again = store.back(labeler, draw.choice(own))
                store.record(labeler, again.task, SkipAction(reason="why"), f"s{step}")
            tasks = db.execute("SELECT labeler, item, repeat, status FROM tasks").fetchall()
            taken = Counter(item for _, item, repeat, status in tasks if repeat == 0 and status != "skipped")
            assert dict(db.execute("SELECT number, taken FROM items WHERE taken > 0")) == taken
            for one in labelers:
                mine = [task for task in tasks if task[0] == one]
                new = [n for n in range(9) if taken[n] < 2 and n not in {item for _, item, *_ in mine}]
                firsts = sum(repeat == 0 and status != "skipped" for _, _, repeat, status in mine)
                repeats = sum(repeat for _, _, repeat, _ in mine)
                due = max(0, math.floor(0.3 * (firsts + len(new)) + 1e-9) - repeats)
                still = sum(status == "open" for *_, status in mine)
                assert store.progress(one).left == still + len(new) + due


def test_damage_inside_the_file_is_said(tmp_path: Path) -> None:
    with made(tmp_path, 2) as store:
        path = store.path
    with contextlib.closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'responses'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    path.write_bytes(whole[: (root - 1) * size] + b"\xff" * size + whole[root * size :])
    with LabelStore.open(path) as store, pytest.raises(DamagedFile, match="expected the storage of a labelling"):
        store.items()
    path.write_bytes(whole)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE responses SET body = '{}' WHERE item = 0")
    with LabelStore.open(path) as store, pytest.raises(DamagedFile):
        store.items()
