"""`rlhf label report` on a real project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Item, RankAction, Response, SkipAction, SubmitAction
from rlhf_pipeline.labelling.store import LabelStore, database

pytest.importorskip("krippendorff", reason="the extra `label` is not installed")
pytestmark = pytest.mark.check  # it draws


def labelled(home: Path) -> LabelStore:
    """Two items, labelers Ada and Bob: they agree on item 0, and Bob skips item 1."""
    items = [
        Item(number=n, prompt="p", responses=[Response(text=text, source="secret-model") for text in ("a", "b")])
        for n in range(2)
    ]
    config = LabelConfig.model_validate({"responses": "x.jsonl", "name": "demo", "overlap": 2})
    store = LabelStore.create(database(home, "demo"), config, items)
    for name in ("Ada", "Bob"):
        labeler = store.labeler(name)
        while (task := store.task(labeler)) is not None:
            if name == "Bob" and task.item == 1:
                store.record(labeler, task.task, SkipAction(reason="no idea"), f"{task.task}-skip")
                continue
            store.record(labeler, task.task, RankAction(ranks=[1, 2]), f"{task.task}-rank")
            store.record(labeler, task.task, SubmitAction(), f"{task.task}-done")
    return store


def test_the_command_writes_the_page_and_prints_all_figures(tmp_path: Path, capsys: Any) -> None:
    labelled(tmp_path).close()
    assert main(["--home", str(tmp_path), "label", "report", "demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["items"], found["judgements"], found["skipped"], found["pairs"]) == (2, 3, 1, 3)
    assert found["agreement"]["mean"] == 1.0 and found["reasons"] == {"no idea": 1}
    text = (tmp_path / "labels/demo/report.html").read_text(encoding="utf-8")
    assert found["report"] == str(tmp_path / "labels/demo/report.html")
    assert "3 judgements of 2 items by 2 labelers" in text and "Ada" not in text and "secret-model" not in text
    assert main(["--home", str(tmp_path), "label", "report", "demo"]) == 0
    printed = capsys.readouterr().out
    assert "agreement of labelers" in printed and "no idea" in printed
    assert main(["--home", str(tmp_path), "label", "report", "none"]) == 2
