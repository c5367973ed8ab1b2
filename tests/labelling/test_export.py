"""Judgements as rows: expected values by hand, ranks of several labelers by Borda's count written out, and training."""

from __future__ import annotations

import json
import os
import random
from itertools import permutations
from pathlib import Path

import pytest

from rlhf_pipeline.data.kinds import as_kind, ranks_of
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.export import export, mean_ranks, publish_rows, read_answer, write_rows
from rlhf_pipeline.labelling.kinds import Item, Judgement, Response


def item(number: int = 0, texts: tuple[str, ...] = (" A", " B", " C"), **further) -> Item:
    return Item(number=number, prompt=f"p{number}", responses=[Response(text=text) for text in texts], **further)


def judged(
    ranks: list[int],
    labeler: int = 7,
    *,
    number: int = 0,
    repeat: int = 0,
    ratings: list[int | None] | None = None,
    flags: list[dict[str, bool]] | None = None,
    **further,
) -> Judgement:
    size = len(ranks)
    return Judgement(
        labeler=labeler,
        item=number,
        repeat=repeat,
        shown=list(range(size)),
        ranks=ranks,
        ratings=ratings or [None] * size,
        flags=flags or [{}] * size,
        note="SECRET",
        seconds=12.25,
        at=1769904000.5,
        **further,
    )


def borda(orders: list[list[int]]) -> list[float]:
    """The points of each response: one for each response that it beats, half of one for a tie, over all labelers."""
    places = range(len(orders[0]))
    return [sum((o[k] < o[j]) + (o[k] == o[j]) / 2 for o in orders for j in places if j != k) for k in places]


def test_the_mean_of_several_labelers_is_bordas():
    """By hand: A beats D and ties twice, then beats two: 4 points; B and D have 3, C has 2. Dense ranks tie A and D."""
    orders = [[1, 1, 1, 2], [2, 3, 4, 1]]
    assert borda(orders) == [4, 3, 2, 3] and mean_ranks(orders) == [1, 2, 3, 2]
    assert mean_ranks([[1, 2, 3], [2, 1, 3]]) == [1, 1, 2]
    for order in ([1, 1, 2], [3, 1, 2], [1, 1, 1]):
        assert mean_ranks([order]) == order


def test_it_orders_by_points_whatever_the_labelers_say():
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(2, 6)
        raw = [[draw.randint(1, size) for _ in range(size)] for _ in range(draw.randint(1, 4))]
        orders = [[sorted(set(order)).index(rank) + 1 for rank in order] for order in raw]
        points, ranks = borda(orders), mean_ranks(orders)
        assert sorted(set(ranks)) == list(range(1, len(set(ranks)) + 1))
        for i, j in permutations(range(size), 2):
            assert (points[i] > points[j]) == (ranks[i] < ranks[j])


def test_rankings_by_hand(tmp_path):
    items = [item(0), item(1, split="test"), item(2), item(3)]
    given = [
        judged([1, 2, 3], 0),
        judged([2, 1, 3], 1),
        judged([1, 1, 2], 0, number=1),
        judged([2, 2, 1], 0, number=1, repeat=1),  # for self-consistency alone
        judged([], 0, number=2, skipped=True, reason="not my language"),
    ]
    found = export(items, given, "rankings")
    assert found.rows == [
        {"prompt": "p0", "completions": [" A", " B", " C"], "ended": [True] * 3, "ranks": [1, 1, 2]},
        {"prompt": "p1", "completions": [" A", " B", " C"], "ended": [True] * 3, "ranks": [1, 1, 2], "split": "test"},
    ]
    assert found.left_out == {"repeated": 1, "skipped": 1, "unlabelled": 2}
    assert "1 items have several labelers" in found.notes[0] and "Borda" in found.notes[0]
    each = export(items, given, "rankings", several="each")
    assert [row["ranks"] for row in each.rows] == [[1, 2, 3], [2, 1, 3], [1, 1, 2]]
    assert "drawn at random" in each.notes[0]
    write_rows(tmp_path / "rows.jsonl", found.rows)
    records = read_records(str(tmp_path / "rows.jsonl")).records
    assert [ranks_of(record) for record in records] == [[1, 1, 2], [1, 1, 2]]


def test_rows_of_each_labeler_do_not_show_who_they_are():
    """In the order of their content: rows of one labeler cannot be told by their place."""
    first = [judged([1, 2, 3], 0), judged([3, 2, 1], 1), judged([1, 2, 3], 0, number=1), judged([3, 2, 1], 1, number=1)]
    swapped = [judged(one.ranks, 1 - one.labeler, number=one.item) for one in first]
    rows = [export([item(0), item(1)], given, "pairs", several="each").rows for given in (first, swapped)]
    assert rows[0] == rows[1] and len(rows[0]) == 12


def test_no_row_has_a_labelers_number_a_note_or_a_time():
    flags = [{"hallucination": True}, {"hallucination": False}, {}]
    given = [judged([1, 2, 3], 77, flags=flags, ratings=[3, 2, 1])]
    for kind in ("rankings", "pairs", "ratings", "labels"):
        found = export([item()], given, kind)
        assert found.rows and not any(
            word in json.dumps(found.rows) for word in ("77", "SECRET", "12.25", "1769904000")
        )


def test_pairs_by_hand(tmp_path):
    """Of four responses with one tie five pairs; the same text twice and an empty one make none."""
    items = [item(0, (" A", " B", " C", " D")), item(1, (" A", " A", "")), item(2, (" A", " B"), kind="arena")]
    given = [judged([2, 1, 2, 3]), judged([1, 2, 3], number=1), judged([2, 1], number=2)]
    found = export(items, given, "pairs")
    sides = [(row["prompt"], row["chosen"], row["rejected"]) for row in found.rows]
    assert sides == [
        ("p0", " B", " A"),
        ("p0", " A", " D"),
        ("p0", " B", " C"),
        ("p0", " B", " D"),
        ("p0", " C", " D"),
        ("p2", " B", " A"),
    ]
    assert found.left_out == {"tied_pair": 1, "identical_pair": 1, "empty_response": 2}
    assert found.notes == ["rows of an arena: do not compare models on these prompts once they have trained on them"]
    write_rows(tmp_path / "rows.jsonl", found.rows)
    assert read_records(str(tmp_path / "rows.jsonl")).records[0].completions == (" B", " A")


def test_token_ids_go_along_where_prompt_and_all_responses_have_them():
    """An empty response is then valid: its ids are EOS. A column that no format reads is kept, `chosen` is not."""
    responses = [Response(text=" A", ids=[5, 0]), Response(text="", ids=[0]), Response(text=" C", ids=[6], ended=False)]
    columns = {"prompt_ids": [1, 2], "topic": "x", "chosen": "y"}
    one = Item(number=0, prompt="p", responses=responses, columns=columns)
    flags = [{"hallucination": False}, {"hallucination": False}, {"hallucination": True}]
    given = [judged([1, 2, 3], flags=flags)]
    (ranking,) = export([one], given, "rankings").rows
    assert ranking == {
        "prompt": "p",
        "prompt_ids": [1, 2],
        "completions": [" A", "", " C"],
        "completion_ids": [[5, 0], [0], [6]],
        "ended": [True, True, False],
        "ranks": [1, 2, 3],
        "topic": "x",
    }
    pairs = export([one], given, "pairs").rows
    assert [(row["chosen_ids"], row["rejected_ids"], row["rejected_ended"]) for row in pairs] == [
        ([5, 0], [0], True),
        ([5, 0], [6], False),
        ([0], [6], False),
    ]
    labels = export([one], given, "labels").rows
    assert [(row["completion_ids"], row["ended"], row["label"]) for row in labels] == [
        ([5, 0], True, True),
        ([0], True, True),
        ([6], False, False),
    ]
    without = one.model_copy(update={"columns": {}})
    (ranking,) = export([without], given, "rankings").rows
    assert "prompt_ids" not in ranking and ranking["completions"] == [" A", " C"] and ranking["ranks"] == [1, 2]


def test_ratings_by_hand(tmp_path):
    """The mean over labelers who graded; C was not graded by both. Flags: the share of yes among the answers."""
    given = [
        judged([1, 2, 3], 0, ratings=[7, 4, 2], flags=[{"opinion": True}, {"opinion": False}, {}]),
        judged([1, 2, 3], 1, ratings=[4, 4, None], flags=[{"opinion": False}, {}, {}]),
        judged([1, 2, 3], 2),
    ]
    found = export([item()], given, "ratings")
    assert found.rows == [
        {"prompt": "p0", "response": " A", "rating": 5.5, "ended": True, "opinion": 0.5},
        {"prompt": "p0", "response": " B", "rating": 4.0, "ended": True, "opinion": 0.0},
    ]
    assert found.left_out == {"not_rated": 1}
    write_rows(tmp_path / "rows.jsonl", found.rows)
    read = read_records(str(tmp_path / "rows.jsonl"))
    assert read.format == "ranking, rated responses" and read.records[0].extra["scores"] == (5.5, 4.0)
    by_opinion = read_records(str(tmp_path / "rows.jsonl"), columns=(("rating", "opinion"),))
    assert by_opinion.records[0].extra["scores"] == (0.5, 0.0)
    with pytest.raises(BadInput, match="ranked against each other"):
        export([item()], given, "ratings", several="each")


def test_a_question_with_the_name_of_a_column_is_exported_under_another_name():
    """The keys of a project cannot be changed once people have labelled; the source's columns give way too."""
    flags = [{"label": True, "prompt": False, "question_prompt": True, "topic": True}, {}, {}]
    given = judged([1, 2, 3], ratings=[1, 2, 3], flags=flags)
    row = export([item(columns={"topic": "x", "more": "y"})], [given], "ratings").rows[0]
    assert row == {
        "prompt": "p0",
        "response": " A",
        "rating": 1.0,
        "ended": True,
        "question_label": 1.0,
        "question_question_prompt": 0.0,
        "question_prompt": 1.0,
        "topic": 1.0,
        "more": "y",
    }


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_folder_or_a_device_is_not_replaced_by_a_file(tmp_path, make):
    make(tmp_path / "there")
    with pytest.raises(BadInput, match="expected the path of a file"):
        write_rows(tmp_path / "there", [{"prompt": "p"}])
    assert not (tmp_path / "there").is_file()


def test_labels_by_hand(tmp_path):
    """Bad: an answer that is bad. Good: every question answered, none badly. Else the response has no label."""
    yes, no = {"hallucination": True}, {"hallucination": False}
    first = judged([1, 2, 3], 0, flags=[no | {"sexual": False}, yes, no])
    found = export([item()], [first], "labels")
    rows = [{"prompt": "p0", "completion": f" {text}", "ended": True, "label": text == "A"} for text in "AB"]
    assert found.rows == rows and found.left_out == {"flags_not_answered": 1}
    assert [row["label"] for row in export([item()], [first], "labels", bad={"hallucination": True}).rows] == [
        True,
        False,
        True,
    ]
    assert [row["label"] for row in export([item()], [first], "labels", bad={"hallucination": False}).rows] == [
        False,
        True,
        False,
    ]
    second = judged([1, 2, 3], 1, flags=[yes, yes, no | {"sexual": False}])
    both = export([item()], [first, second], "labels")
    assert [(row["completion"], row["label"]) for row in both.rows] == [(" B", False), (" C", True)]
    assert both.left_out == {"no_majority": 1}
    each = export([item()], [first, second], "labels", several="each")
    assert [(row["completion"], row["label"]) for row in each.rows] == [
        (" A", False),
        (" A", True),
        (" B", False),
        (" B", False),
        (" C", True),
    ]
    write_rows(tmp_path / "rows.jsonl", found.rows)
    read = read_records(str(tmp_path / "rows.jsonl"))
    assert read.format == "demonstration, labelled"
    assert [one.extra["label"] for one in as_kind(list(read.records), "labelled")[0]] == [True, False]


@pytest.mark.parametrize(
    ("flags", "bad", "told"),
    [
        ({"opinion": True}, None, r"no question that makes a response bad \(answered: opinion\)"),
        ({}, None, r"\(answered: none\)"),
        ({"opinion": True}, {"opinon": True}, "--bad opinon: nobody answered this question.*did you mean 'opinion'"),
    ],
)
def test_labels_need_a_question_that_was_answered(flags, bad, told):
    with pytest.raises(BadInput, match=told):
        export([item()], [judged([1, 2, 3], flags=[flags, {}, {}])], "labels", bad=bad)


def test_an_answer_that_is_bad():
    assert [read_answer(text) for text in ("a", "a=yes", "a=no")] == [("a", True), ("a", True), ("a", False)]
    with pytest.raises(BadInput, match="found 'maybe'"):
        read_answer("a=maybe")


def test_published_rows_are_collected_data(tmp_path):
    from rlhf_pipeline.registry.store import Registry

    registry = Registry(tmp_path)
    items = [item(0, split="train"), item(1, split="test")]
    found = export(items, [judged([1, 2, 3]), judged([1, 1, 2], number=1)], "rankings")
    version = publish_rows(registry, "people", found, project="mine", seed=3)
    made = version.manifest
    assert version.label == "people@v1" and made.stage == "collect" and made.seed == 3
    assert made.metrics["judge"] == made.config["judge"] == "people:mine"
    assert made.metrics["records"] == 2 and made.metrics["by_split"] == {"train": 1, "test": 1}
    read = read_records("collected:people", home=tmp_path)
    assert [ranks_of(record) for record in read.records] == [[1, 2, 3], [1, 1, 2]]
    assert [record.split for record in read.records] == ["train", "test"]
    with pytest.raises(BadInput, match=r"mine: no rankings to publish \(unlabelled 2\)"):
        publish_rows(registry, "people", export(items, [], "rankings"), project="mine")
