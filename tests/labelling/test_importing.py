"""`rlhf label export` and `rlhf label import`: rows, published data, projects of other tools, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.labelling.importing import form_of, make_project
from rlhf_pipeline.labelling.kinds import FlagAction, Item, RankAction, RateAction, Response, SkipAction, SubmitAction
from rlhf_pipeline.labelling.pairs import pairs_of
from rlhf_pipeline.labelling.store import LabelStore, database
from rlhf_pipeline.labelling.tools.form import Imported


def project(home: Path, name: str = "mine") -> None:
    """Two items of three responses, judged by two labelers; the second skips one of them."""
    responses = [Response(text=text) for text in (" A", " B", " C")]
    items = [Item(number=n, prompt=f"p{n}", responses=responses, split="train") for n in (0, 1)]
    values = {"name": name, "responses": str(home), "overlap": 2}
    config = load_config("label", None, extra=values).of(LabelConfig)
    with LabelStore.create(database(home, name), config, items) as store:
        for labeler, ranks in ((store.labeler("Ada"), [1, 2, 2]), (store.labeler("Ben"), [3, 2, 1])):
            for number in (0, 1):
                task = store.task(labeler)
                assert task is not None
                done: list[Any] = [RankAction(ranks=ranks), RateAction(response=0, value=5)]
                done += [FlagAction(response=k, flag="hallucination", value=k == 2) for k in range(3)]
                last = SkipAction(reason="unclear") if (labeler, number) == (2, 1) else SubmitAction()
                recorded = [
                    store.record_soon(labeler, task.task, action, f"{labeler}-{number}-{place}")
                    for place, action in enumerate([*done, last])
                ]
                assert recorded[-1].result().status != "open"


def answer(capsys: Any, *words: str) -> tuple[int, dict[str, Any], str]:
    code = main([*words, "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out), printed.err


@pytest.mark.check
def test_labels_as_rows_and_as_collected_data(tmp_path: Path, capsys: Any) -> None:
    """Places 1, 2.5, 2.5 and 3, 2, 1 have the means 2, 2.25, 1.75; the names of the labelers are nowhere."""
    project(tmp_path)
    words = ["--home", str(tmp_path), "label", "export", "mine"]
    file = tmp_path / "rows.jsonl"
    code, found, said = answer(capsys, *words, "--output", str(file))
    assert (code, found["rows"], found["left_out"]) == (0, 2, {"skipped": 1})
    assert "1 items have several labelers: their mean rank (Borda)" in said and "left out: skipped 1" in said
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["ranks"] for row in rows) == [[1, 2, 2], [2, 3, 1]]
    code, found, _ = answer(capsys, *words, "--as", "pairs", "--several", "each", "--publish", "people")
    with LabelStore.open(database(tmp_path, "mine")) as store:
        expected = len(pairs_of(store.items(), store.judgements()))
    assert (code, found["rows"], found["data"]) == (0, expected, "collected:people@v1")
    code, found, _ = answer(capsys, *words, "--as", "labels", "--bad", "hallucination", "--publish", "kto")
    assert (code, found["rows"]) == (0, 6)
    for path in (tmp_path / "data").rglob("*.json*"):
        assert not any(name in path.read_text() for name in ("Ada", "Ben"))
    made = json.loads((tmp_path / "data/kto/v1/manifest.json").read_text())
    assert made["config"] == {"judge": "people:mine", "as": "labels", "several": "mean", "bad": {"hallucination": True}}


@pytest.mark.check
@pytest.mark.parametrize("tool", ["argilla", "label-studio"])
def test_a_project_goes_to_another_tool_and_comes_back(tmp_path: Path, capsys: Any, tool: str) -> None:
    """The judgements are the same but for who, when and the order on the page; a new home has the project at once."""
    project(tmp_path)
    users = [f"00000000-0000-0000-0000-00000000000{number}" for number in (1, 2)]
    given = [word for user in users for word in ("--user", user)] if tool == "argilla" else []
    words = [
        "--home",
        str(tmp_path),
        "label",
        "export",
        "mine",
        "--as",
        tool,
        "--output",
        str(tmp_path / "out"),
        *given,
    ]
    code, written, said = answer(capsys, *words)
    assert (code, written["items"]) == (0, 2) and "lost: 4 judgements, of which the time" in said
    home = ["--home", str(tmp_path / "other")]
    code, made, _ = answer(capsys, *home, "label", "import", str(tmp_path / "out"), "--name", "back")
    assert (code, made["items"], made["judgements"], made["labelers"]) == (0, 2, 4, 2)
    both = [LabelStore.open(database(tmp_path, "mine")), LabelStore.open(database(tmp_path / "other", "back"))]
    kept = ("item", "ranks", "ratings", "flags", "skipped", "reason")
    if tool == "argilla":
        kept = ("item", "ranks", "skipped", "reason")  # grades and flags of a skipped item are lost
    seen = [sorted(str({key: getattr(one, key) for key in kept}) for one in _done(store)) for store in both]
    assert seen[0] == seen[1] and both[0].items() == both[1].items()
    assert form_of(both[1].config).flags.keys() == form_of(both[0].config).flags.keys()
    assert both[1].config.overlap == 2 and both[1].task(both[1].labeler("labeler 1")) is None
    for store in both:
        store.close()
    code, refused, _ = answer(capsys, *home, "label", "import", str(tmp_path / "out"), "--name", "back")
    assert code == 2 and "there is a labelling project already" in refused["error"]["faults"][0]["found"]
    rows = tmp_path / "rows.jsonl"
    code, found, _ = answer(capsys, "label", "import", str(tmp_path / "out"), "--as", "rankings", "-o", str(rows))
    assert (code, found["rows"]) == (0, 2) and rows.is_file()


def _done(store: LabelStore) -> list[Any]:
    """Judgements without the answers to some of the questions, which other tools cannot say."""
    return [one.model_copy(update={"flags": []}) for one in store.judgements() if not one.skipped]


def test_what_a_project_has_no_place_for_is_counted(tmp_path: Path) -> None:
    """A third judgement of one labeler, a time over five minutes, grades of a scale that is too long."""
    from rlhf_pipeline.labelling.tools.form import Form, judgement_of

    items = [Item(number=5, prompt="p", responses=[Response(text="A"), Response(text="B")])]
    seconds = (10.0, 400.0, 1.0)
    judgements = [judgement_of(5, 0, [1, 0], ranks=[1, 2], ratings=[90, None], seconds=time) for time in seconds]
    found = Imported(Form(name="x", lowest=0, highest=100), items, judgements)
    with make_project("x", tmp_path, tmp_path, found) as store:
        first, second = store.judgements()
        assert [item.number for item in store.items()] == [0] and store.config.num == 1
    assert (first.ranks, first.ratings, first.shown, first.repeat, second.repeat) == ([1, 2], [None] * 2, [1, 0], 0, 1)
    assert first.seconds == pytest.approx(10, abs=1e-4) and second.seconds == 0
    assert +found.lost == {
        "grades from 0 to 100: a scale has at most 11, from 0 on": 3,
        "third judgements of an item by one labeler": 1,
        "times over 300 seconds on an item": 1,
    }


def test_mistakes_are_said(tmp_path: Path, capsys: Any) -> None:
    project(tmp_path)
    for words, said in (
        (("export", "mine"), "expected --output FILE or --publish NAME, one of them"),
        (("export", "mine", "--as", "argilla"), "expected --output FOLDER"),
        (("export", "mine", "--as", "labels", "--bad", "x=y", "--publish", "z"), "found 'y'"),
        (("export", "nothing", "--output", "f"), "found no project 'nothing'"),
        (("import", "missing"), "there is no such file or folder"),
        (("import", ".", "--output", "f"), "expected --as rankings"),
    ):
        code, failed, _ = answer(capsys, "--home", str(tmp_path), "label", *words)
        assert code == 2 and said in json.dumps(failed["error"]["faults"]), words
