"""Project files of Argilla and Label Studio: what is written is read back, and files as these tools write them."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_pipeline.errors import BadInput, RlhfError
from rlhf_pipeline.labelling.kinds import Item, Judgement, Response
from rlhf_pipeline.labelling.tools.argilla import read_argilla
from rlhf_pipeline.labelling.tools.argilla_write import write_argilla
from rlhf_pipeline.labelling.tools.form import Form, key_of, page_order, prompt_name, ranks_of_choice, response_names
from rlhf_pipeline.labelling.tools.label_studio import read_label_studio
from rlhf_pipeline.labelling.tools.label_studio_write import write_label_studio

USERS = [f"00000000-0000-0000-0000-00000000000{number}" for number in range(3)]
FLAGS = {"hallucination": "Makes something up", "opinion": "Expresses an opinion"}
FORM = Form(name="mine", lowest=1, highest=7, flags=FLAGS, instructions="Read *all* of it.")
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    str.strip
)


def dense(ranks: list[int]) -> list[int]:
    return [sorted(set(ranks)).index(rank) + 1 for rank in ranks]


@st.composite
def projects(draw) -> tuple[list[Item], list[Judgement]]:
    """Items, all in texts or all in messages, and judgements whose notes say whose they are."""
    chat = draw(st.booleans())
    items, judgements = [], []
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.integers(2, 4))
        responses = [
            Response(
                text=[{"role": "assistant", "content": draw(TEXTS)}] if chat else draw(TEXTS),
                source=draw(st.sampled_from([None, "sft@v1", "dpo@v2"])),
                ids=draw(st.none() | st.lists(st.integers(0, 9), max_size=3)),
                ended=draw(st.booleans()),
            )
            for _ in range(size)
        ]
        prompt = [{"role": "user", "content": draw(TEXTS)}] if chat else draw(TEXTS)
        split = draw(st.sampled_from([None, "train", "test"]))
        kind = "arena" if size == 2 and draw(st.booleans()) else "rank"
        columns = {"prompt_ids": [1, 2]} if draw(st.booleans()) else {}
        item = Item(number=number, kind=kind, prompt=prompt, responses=responses, split=split, columns=columns)
        items.append(item)
        for labeler in draw(st.sets(st.integers(0, 2))):
            skipped = draw(st.booleans())
            answered = [draw(st.booleans()) for _ in range(size)]
            judgement = Judgement(
                labeler=labeler,
                item=number,
                repeat=0,
                shown=page_order(item),
                ranks=[] if skipped else dense([draw(st.integers(1, size)) for _ in range(size)]),
                ratings=[None if skipped else draw(st.none() | st.integers(1, 7)) for _ in range(size)],
                flags=[{key: draw(st.booleans()) for key in FLAGS} if one and not skipped else {} for one in answered],
                note="" if skipped else f"note of {labeler}",
                skipped=skipped,
                reason=f"reason of {labeler}" if skipped else "",
                seconds=0.0,
                at=0.0,
            )
            judgements.append(judgement)
    return items, judgements


def told(judgements: list[Judgement]) -> list[Judgement]:
    """Judgements with the labeler that their note names, in order."""
    named = [one.model_copy(update={"labeler": int((one.note or one.reason)[-1])}) for one in judgements]
    return sorted(named, key=lambda one: (one.item, one.labeler))


def consistent(judgements: list[Judgement]) -> bool:
    """Whether each labeler has one number."""
    pairs = {(one.labeler, (one.note or one.reason)[-1]) for one in judgements}
    return len(pairs) == len({number for number, _ in pairs}) == len({name for _, name in pairs})


PROPERTY = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.check
@PROPERTY
@given(projects())
def test_what_is_written_for_argilla_is_read_back(project):
    """Items with models and ids, ranks with ties, grades, answers, notes and skips; not the time."""
    items, judgements = project
    with tempfile.TemporaryDirectory() as folder:
        lost = write_argilla(Path(folder) / "out", items, judgements, FORM, users=USERS, models=True)
        found = read_argilla(Path(folder) / "out")
    assert sorted(found.items, key=lambda item: item.number) == items and not +lost
    assert told(found.judgements) == told(judgements) and consistent(found.judgements)
    assert (found.form.lowest, found.form.highest, found.form.flags) == (1, 7, FLAGS) and not +found.lost
    assert found.form.instructions == FORM.instructions


@pytest.mark.check
@PROPERTY
@given(projects())
def test_what_is_written_for_label_studio_is_read_back(project):
    items, judgements = project
    with tempfile.TemporaryDirectory() as folder:
        lost = write_label_studio(Path(folder) / "out", items, judgements, FORM, models=True)
        found = read_label_studio(Path(folder) / "out")
    assert found.items == items and not +lost
    assert sorted(found.judgements, key=lambda one: (one.item, one.labeler)) == told(judgements)
    assert (found.form.lowest, found.form.highest, found.form.flags) == (1, 7, FLAGS) and not found.lost


def example() -> tuple[list[Item], list[Judgement]]:
    """One item of three responses, one of them empty, and a judgement with every kind of answer."""
    texts = zip((" A", "", " C"), ("sft@v1", "dpo@v1", "dpo@v1"), strict=True)
    responses = [Response(text=text, source=source) for text, source in texts]
    item = Item(number=2, prompt="p <b>", responses=responses)
    flags = [{"hallucination": True, "opinion": False}, {"hallucination": False, "opinion": False}, {"opinion": True}]
    common = {"item": 2, "shown": [0, 1, 2], "seconds": 31.5, "at": 1769904000.5}
    judgement = Judgement(labeler=1, repeat=0, ranks=[2, 1, 1], ratings=[2, 7, None], flags=flags, note="n", **common)
    again = judgement.model_copy(update={"repeat": 1})
    return [item], [judgement, again]


@pytest.mark.parametrize("tool", ["argilla", "label studio"])
def test_one_item_there_and_back(tmp_path, tool):
    """A part of the answers to the questions on C is lost, and the second look in Argilla; nothing else."""
    items, judgements = example()
    if tool == "argilla":
        write_argilla(tmp_path / "out", items, judgements, FORM, users=USERS, models=True)
        found = read_argilla(tmp_path / "out")
    else:
        write_label_studio(tmp_path / "out", items, judgements, FORM, models=True)
        found = read_label_studio(tmp_path / "out")
    kept = [one.model_copy(update={"flags": [*one.flags[:2], {}], "seconds": 0.0, "at": 0.0}) for one in judgements]
    kept = [one.model_copy(update={"shown": page_order(items[0])}) for one in kept]
    kept = [one.model_copy(update={"labeler": 0}) for one in kept[:1]] if tool == "argilla" else kept
    assert found.items == items and found.judgements == kept and found.form.flags == FLAGS


def test_what_argilla_gets(tmp_path):
    """By hand: the field of each place, ranks from 1 with a tie, users by number; what is lost is counted."""
    items, judgements = example()
    order = page_order(items[0])
    lost = write_argilla(tmp_path / "out", items, judgements, FORM, users=USERS[:2])
    (record,) = json.loads((tmp_path / "out/records.json").read_text())
    assert record["fields"] == {"prompt": "p <b>"} | {
        f"response_{place}": (" A", "", " C")[k] for place, k in enumerate(order, 1)
    }
    ranks = [{"value": f"response_{place}", "rank": (2, 1, 1)[k]} for place, k in enumerate(order, 1)]
    ranking = {"value": ranks, "user_id": USERS[1], "status": "submitted"}
    assert record["responses"]["ranking"] == [ranking]
    chosen = {k: record["responses"].get(f"flags_{place}") for place, k in enumerate(order, 1)}
    assert [one and one[0]["value"] for _, one in sorted(chosen.items())] == [
        ["hallucination"],
        ["none_of_these"],
        None,
    ]
    assert dict(+lost) == {
        "yes/no answers to a part of the questions on a response": 1,
        "judgements of an item that was shown again": 1,
        "models of responses (they would unblind labelers)": 3,
    }
    settings_ = json.loads((tmp_path / "out/.argilla/settings.json").read_text())
    assert [field["name"] for field in settings_["fields"]] == ["prompt", "response_1", "response_2", "response_3"]
    assert settings_["distribution"] == {"strategy": "overlap", "min_submitted": 1}
    for path in (tmp_path / "out").rglob("*.json"):
        assert not any(word in path.read_text() for word in ("sft@v1", "31.5", "1769904000"))
    lost = write_argilla(tmp_path / "other", items, judgements, FORM)
    assert lost["judgements of labelers who are no user of Argilla (give their ids)"] == 1
    with pytest.raises(BadInput, match="is not empty"):
        write_argilla(tmp_path / "out", items, judgements, FORM)
    with pytest.raises(BadInput, match="scale from 1 to 20, expected 0 to 10"):
        write_argilla(tmp_path / "more", items, [], Form(highest=20))


def test_what_label_studio_gets(tmp_path):
    """By hand: a bucket for each rank, in which ties stand together; no annotation counts as the right answer."""
    items, judgements = example()
    lost = write_label_studio(tmp_path / "out", items, judgements, FORM)
    (task,) = json.loads((tmp_path / "out/tasks.json").read_text())
    first, again = task["annotations"]
    values = {result["from_name"]: result["value"] for result in first["result"]}
    buckets = values["rank"]["ranker"]
    assert (buckets["_"], sorted(buckets["1"]), buckets["2"], buckets["3"]) == ([], ["r1", "r2"], ["r0"], [])
    place = page_order(items[0]).index(1) + 1
    assert values[f"rating_{place}"] == {"rating": 7} and values[f"flags_{place}"] == {"choices": ["none_of_these"]}
    assert {one["ground_truth"] for one in (first, again)} == {False} and "completed_by" not in first
    assert lost["yes/no answers to a part of the questions on a response"] == 2
    config = (tmp_path / "out/label_config.xml").read_text()
    assert '<Choice value="Makes something up" alias="hallucination" />' in config
    assert '<Rating name="rating_3" toName="response_3" maxRating="7" />' in config and "rating_4" not in config
    for path in (tmp_path / "out").iterdir():
        assert not any(word in path.read_text() for word in ("sft@v1", "31.5", "1769904000"))
    write_label_studio(tmp_path / "zero", items, [], Form(lowest=0))
    assert (
        '<Number name="rating_1" toName="response_1" min="0" max="7"'
        in (tmp_path / "zero/label_config.xml").read_text()
    )
    assert read_label_studio(tmp_path / "zero").form.lowest == 0
    assert [one.repeat for one in read_label_studio(tmp_path / "out").judgements] == [0, 1]


RANKING = {"name": "ranking", "settings": {"type": "ranking", "options": [{"value": v, "text": v} for v in ("a", "b")]}}
PREFERENCE = {
    "name": "preference",
    "settings": {"type": "label_selection", "options": [{"value": v} for v in ("response-1", "response-2", "tie")]},
}
RATING = {"name": "quality-2", "settings": {"type": "rating", "options": [{"value": value} for value in range(1, 6)]}}
SETTINGS = {
    "fields": [{"name": name} for name in ("instruction", "response-1", "response-2")],
    "questions": [RANKING, PREFERENCE, RATING, {"name": "why", "settings": {"type": "text"}}],
    "guidelines": "g",
}
FIELDS = {"instruction": "Rain?", "response-1": "No.", "response-2": "Yes."}
RANKED = [{"value": "a", "rank": 2}, {"value": "b", "rank": 1}]
OLD = """fields:
- {name: instruction, type: text}
- {name: response-1, type: text}
- {name: response-2, type: text}
questions:
- {name: ranking, type: ranking, values: [a, b]}
- {name: why, type: text}
guidelines: g
"""


def argilla(folder: Path, rows: list[dict], kind: str = "records.json", old: bool = False) -> Path:
    """A dataset of Argilla as it stands on disk."""
    (folder / ".argilla").mkdir(parents=True)
    if old:
        (folder / "argilla.yaml").write_text(OLD)
    else:
        (folder / ".argilla/settings.json").write_text(json.dumps(SETTINGS))
    lines = json.dumps(rows) if kind.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / kind).write_text(lines)
    return folder


def answered(ranking: object) -> dict:
    """The two answers of a user as 1.x has them."""
    return {
        "ranking": [{"user_id": "u", "value": ranking, "status": "submitted"}],
        "why": [{"user_id": "u", "value": "w", "status": "submitted"}],
    }


ON_THE_SERVER = {"user_id": "u", "status": "submitted", "values": {"ranking": {"value": RANKED}, "why": {"value": "w"}}}
ON_THE_HUB = {"ranking.responses": [RANKED], "why.responses": ["w"]} | {
    f"{name}.responses.{part}": [value]
    for name in ("ranking", "why")
    for part, value in (("users", "u"), ("status", "submitted"))
}
IN_COLUMNS = {
    name: {key: [one[key]] for key in one} for name, (one,) in answered({"rank": [2, 1], "value": ["a", "b"]}).items()
}


@pytest.mark.parametrize(
    ("row", "kind", "old"),
    [
        ({"fields": FIELDS, "responses": [ON_THE_SERVER]}, "records.json", False),
        (FIELDS | ON_THE_HUB, "train.jsonl", False),
        (FIELDS | answered(RANKED), "train.jsonl", True),
        (FIELDS | IN_COLUMNS, "train.jsonl", True),
    ],
    ids=["server", "2.x hub", "1.x", "1.x as datasets stores it"],
)
def test_the_forms_that_argilla_writes(tmp_path, row, kind, old):
    found = read_argilla(argilla(tmp_path / "data", [row], kind, old))
    (item,), (judgement,) = found.items, found.judgements
    assert (item.prompt, [response.text for response in item.responses]) == ("Rain?", ["No.", "Yes."])
    assert (judgement.ranks, judgement.note, judgement.labeler) == ([2, 1], "w", 0)
    assert found.form.instructions == "g" and not +found.lost


def test_rankings_of_argilla_without_ranks_are_refused(tmp_path):
    """argilla 2.x writes the options of a ranking in their own order, whoever was first (findings/)."""

    def row(*orders: list[str]) -> dict:
        answers = [{"value": order, "user_id": str(number)} for number, order in enumerate(orders)]
        return {"fields": FIELDS, "responses": {"ranking": answers}}

    with pytest.raises(BadInput, match=r"without their ranks.*\(2 answers\).*responses as data, or a 1\.x export"):
        read_argilla(argilla(tmp_path / "data", [row(["a", "b"], ["a", "b"])]))
    found = read_argilla(argilla(tmp_path / "listed", [row(["a", "b"], ["b", "a"])]))
    assert [one.ranks for one in found.judgements] == [[1, 2], [2, 1]]
    assert any("ties are not in them" in note for note in found.notes)
    assert any("does not say which answers were submitted" in note for note in found.notes)


def test_other_answers_of_argilla(tmp_path):
    """A choice names the better one or a tie; discarded is skipped; drafts and answers without an order are lost."""

    def answer(user: str, status: str = "submitted", **values) -> dict:
        return {
            "user_id": user,
            "status": status,
            "values": {name.replace("_", "-"): {"value": v} for name, v in values.items()},
        }

    given = [
        answer("u", preference="response-2", quality_2=4),
        answer("v", preference="tie"),
        answer("w", "discarded", why="unclear"),
        answer("x", "draft", preference="tie"),
        answer("y", quality_2=3),
    ]  # fmt: skip
    found = read_argilla(argilla(tmp_path / "data", [{"fields": FIELDS, "responses": given}]))
    first, second, third = found.judgements
    assert (first.ranks, first.ratings, second.ranks) == ([2, 1], [None, 4], [1, 1])
    assert (third.skipped, third.reason, third.ranks) == (True, "unclear", [])
    assert [one.labeler for one in found.judgements] == [0, 1, 2] and found.form.highest == 5
    assert +found.lost == {"drafts": 1, "answers without a ranking of all responses": 1}


def label_studio(folder: Path, config: str | None, *tasks: dict) -> Path:
    folder.mkdir()
    if config is not None:
        (folder / "label_config.xml").write_text(config)
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return folder


def annotation(user: int, *results: tuple[str, dict], **further) -> dict:
    made = [{"from_name": name, "to_name": "x", "type": "t", "value": value} for name, value in results]
    return {"completed_by": user, "result": made, **further}


def test_the_ranker_of_label_studio(tmp_path):
    """Its list is in the order of JavaScript: whole numbers first. A bucket with a number is a rank, no other is."""
    items = [{"id": "b", "body": "B"}, {"id": 10, "body": "C"}, {"id": 9, "title": "A"}]
    config = (
        '<View><Text name="t" value="$prompt"/><List name="l" value="$items"/><Ranker name="rank" toName="l"/></View>'
    )
    task = {
        "data": {"prompt": "Rain?", "items": items},
        "annotations": [
            annotation(5, ("rank", {"ranker": {"rank": ["b", "9", "10"]}}), lead_time=3.5),
            annotation(6, ("rank", {"ranker": {"rank": ["9", "10", "b"]}})),
            annotation(5, ("rank", {"ranker": {"1": ["b", "9"], "rank_2": ["10"], "_": []}})),
            annotation(7, ("rank", {"ranker": {"good": ["b", "9"], "biased": ["10"]}})),
            annotation(7, ("rank", {"ranker": {"1": ["b"], "_": ["9", "10"]}})),
            annotation(8, ("note", {"text": ["off topic"]}), was_cancelled=True),
        ],
    }
    found = read_label_studio(label_studio(tmp_path / "data", config, task))
    assert [response.text for response in found.items[0].responses] == ["A", "C", "B"]
    assert [one.ranks for one in found.judgements] == [[2, 3, 1], [1, 2, 3], [1, 2, 1], []]
    assert [one.labeler for one in found.judgements] == [0, 1, 0, 2] and found.judgements[0].seconds == 3.5
    assert found.judgements[3].reason == "off topic"
    assert found.lost == {
        "rankings that leave out responses, or with buckets that are no ranks": 2,
        "annotations without a ranking of all responses": 2,
    }
    assert found.notes == [
        "1 of 2 rankings are in the order of their task: a Ranker without buckets also writes this order where nobody "
        "has moved anything"
    ]


def test_pairs_and_choices_of_label_studio(tmp_path):
    config = """<View><Pairwise name="pw" toName="left,right"/><Text name="left" value="$answer_1"/>
    <Text name="right" value="$answer_2"/><Choices name="better" toName="left"><Choice value="Answer 1"/>
    <Choice value="Answer 2"/><Choice value="Tie"/></Choices></View>"""
    data = {"question": "Rain?", "answer_1": "No.", "answer_2": "Yes."}
    answers = [("pw", {"selected": "right"}), ("better", {"choices": ["Tie"]}), ("better", {"choices": ["Answer 1"]})]
    task = {"data": data, "annotations": [annotation(n, answer) for n, answer in enumerate(answers)]}
    for place, interface in enumerate((config, None)):
        found = read_label_studio(label_studio(tmp_path / str(place), interface, task))
        assert [response.text for response in found.items[0].responses] == ["No.", "Yes."]
        assert [one.ranks for one in found.judgements] == [[2, 1], [1, 1], [1, 2]]
    assert "no label_config.xml beside it" in found.notes[0]


@pytest.mark.parametrize(
    ("tasks", "config", "said"),
    [
        ([{"prompt": "p", "rank": [], "annotator": 1}], None, "expected the export 'JSON', not 'JSON-MIN'"),
        ({"a": 1}, None, "expected a list of tasks"),
        ([], '<!DOCTYPE x [<!ENTITY a "b">]><View/>', "declares a document type"),
        ([], "<View>", "not a labelling interface"),
    ],
)
def test_files_that_are_no_project_of_label_studio(tmp_path, tasks, config, said):
    folder = label_studio(tmp_path / "data", config)
    (folder / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(BadInput, match=said):
        read_label_studio(folder)


def test_a_folder_that_is_no_dataset_of_argilla(tmp_path):
    with pytest.raises(BadInput, match=r"found no .argilla/settings.json or argilla.yaml"):
        read_argilla(tmp_path)
    folder = argilla(tmp_path / "data", [])
    (folder / ".argilla/settings.json").write_text('{"fields": [{"name": "text"}], "questions": []}')
    with pytest.raises(BadInput, match="found the fields text, expected a prompt and two responses"):
        read_argilla(folder)


def test_options_that_differ_in_case_alone_are_one_question(tmp_path):
    options = [{"value": value, "text": value} for value in ("Too long", "too-long")]
    question = {"name": "flags_1", "title": "1", "settings": {"type": "multi_label_selection", "options": options}}
    ranking = {"type": "ranking", "options": [{"value": "response_1"}, {"value": "response_2"}]}
    fields = [{"name": name} for name in ("prompt", "response_1", "response_2")]
    rank = {"name": "rank", "title": "rank", "settings": ranking}
    (tmp_path / ".argilla").mkdir()
    (tmp_path / ".argilla/settings.json").write_text(json.dumps({"fields": fields, "questions": [rank, question]}))
    ranks = [{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 2}]
    values = {"rank": {"value": ranks}, "flags_1": {"value": ["Too long"]}}
    texts = {"prompt": "p", "response_1": "a", "response_2": "b"}
    row = {"fields": texts, "responses": [{"user_id": "u", "status": "submitted", "values": values}]}
    (tmp_path / "records.json").write_text(json.dumps([row]))
    (found,) = read_argilla(tmp_path).judgements
    assert found.flags == [{"too_long": True}, {}]


def test_odd_values_of_label_studio(tmp_path):
    """Two responses with one id are no item: which of them was meant, nobody can say. Nobody counts to 10^5000."""
    task = {"data": {"prompt": "p", "list": [{"id": 1, "body": "a"}, {"id": 1, "body": "b"}]}}
    found = read_label_studio(label_studio(tmp_path / "ids", None, task))
    assert found.items == [] and "two responses with one id" in next(iter(found.lost))
    rating = f'<View><Rating name="r1" toName="a" maxRating="{"9" * 5000}"/></View>'
    assert read_label_studio(label_studio(tmp_path / "grades", rating)).form.highest == 5


def test_half_a_surrogate_pair_is_refused(tmp_path):
    folder = label_studio(tmp_path / "data", None, {"data": {"prompt": "\ud800", "answer_1": "a", "answer_2": "b"}})
    with pytest.raises(BadInput, match="not JSON in UTF-8"):
        read_label_studio(folder)


def test_names_by_hand():
    keys = [key_of(name) for name in ("Makes it up!", "2 wrong", "\u9519\u8bef", "\u6709\u5bb3", "x" * 80)]
    assert keys[:2] == ["makes_it_up", "flag_2_wrong"] and len(set(keys)) == 5
    alike = [key_of(name) for name in ("C", "C++", "C#", "1", "+1", "-1", "<50 %", ">50 %", "50")]
    assert alike[0] == "c" and len(set(alike)) == len(alike)
    keys += alike
    assert all(re.fullmatch("[a-z][a-z0-9_]{0,63}", key) for key in keys)
    assert response_names(["prompt", "response_1", "response_2"]) == ["response_1", "response_2"]
    assert response_names(["instruction", "Response A", "Response B", "score_1"]) == ["Response A", "Response B"]
    assert response_names(["prompt", "chosen", "rejected"]) == ["chosen", "rejected"]
    assert response_names(["prompt", "text"]) == []
    assert prompt_name(["id", "question", "answer_1"], ["answer_1"]) == "question"
    names = ["response_1", "response_2"]
    for choice, ranks in (
        ("response_2", [2, 1]),
        ("Response 1", [1, 2]),
        ("B", [2, 1]),
        ("left", [1, 2]),
        ("Equally good", [1, 1]),
        ("3", None),
        ("unsure", None),
    ):
        assert ranks_of_choice(choice, names) == ranks, choice


@pytest.mark.check
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_a_damaged_file_is_an_error_in_words(data):
    """One value anywhere is replaced by one of another kind: items and judgements, or a message; no traceback."""
    items, judgements = example()
    other = data.draw(st.sampled_from([None, 1, "x", [], {}, [1], {"a": 1}, True, -5, [[]], [{"id": None}]]))
    with tempfile.TemporaryDirectory() as folder:
        tool, name, read = data.draw(
            st.sampled_from(
                [
                    ("argilla", "records.json", read_argilla),
                    ("argilla", ".argilla/settings.json", read_argilla),
                    ("studio", "tasks.json", read_label_studio),
                ]
            )
        )
        out = Path(folder) / "out"
        if tool == "argilla":
            write_argilla(out, items, judgements, FORM, users=USERS)
        else:
            write_label_studio(out, items, judgements, FORM)
        content = json.loads((out / name).read_text())
        if name == "records.json":
            content[0]["metadata"]["rlhf"] = json.loads(content[0]["metadata"]["rlhf"])
        holder, key = None, None
        value = content
        for _ in range(data.draw(st.integers(1, 8))):
            keys = (
                list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
            )
            if not keys:
                break
            holder, key = value, data.draw(st.sampled_from(keys))
            value = holder[key]
        if holder is not None:
            holder[key] = other
        (out / name).write_text(json.dumps(content))
        try:
            read(out)
        except RlhfError as error:
            assert str(error)
