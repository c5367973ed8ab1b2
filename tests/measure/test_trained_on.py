"""A model's own data read again: what has changed since it was trained, and whose they are where they are missing."""

from __future__ import annotations

import json
import shutil
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data import world
from rlhf_pipeline.data.load import records_digest
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.measure import training_loss
from rlhf_pipeline.measure.trained_on import changes_of, note_changes
from tests.conftest import Lab, word_rankings

FILE = "my_pairs.jsonl"


@pytest.fixture(scope="module")
def trained(tiny: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """reward@v2, dpo@v1 and ppo@v1, trained on a file beside their home that they name by a relative path."""
    folder = tmp_path_factory.mktemp("own")
    lab = tiny.copy(folder / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Path(FILE).open("w") as file:
            for row, prompt in zip(word_rankings(306, ties=False), cycle(world.records("prompts"))):
                chosen, rejected = row["completions"][:2]
                file.write(json.dumps({"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}) + "\n")
        lab.run("train-rm", output_name="reward", dataset_name=FILE, max_steps=2)
        lab.run("dpo", dataset_name=FILE, max_steps=1)
        lab.run("ppo", dataset_name=FILE, max_steps=1)
    return lab


@pytest.fixture
def own(trained: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A copy, with its file in the working directory."""
    lab = trained.copy(tmp_path / "home")
    (tmp_path / FILE).write_bytes((trained.home.parent / FILE).read_bytes())
    monkeypatch.chdir(tmp_path)
    return lab


def cut(keep: int = 250) -> None:
    rows = Path(FILE).read_text().splitlines(keepends=True)
    assert len(rows) > keep
    Path(FILE).write_text("".join(rows[:keep]))


def compare(lab: Lab, *words: str) -> int:
    shared = ("--samples", "1", "--max-prompts", "4", "--home", str(lab.home), "use_cpu=true", "exact=false", "--json")
    return main(["compare", "ppo", "dpo", "--baseline", "sft", *words, *shared])


@pytest.mark.check
def test_a_comparison_says_once_that_the_data_have_changed(capsys, own):
    cut()
    assert compare(own) == 0
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert said.count("have changed since it was trained") == 1  # PPO's prompts and DPO's pairs are of the one file
    assert f"note: the data of ppo@v1 have changed since it was trained: {FILE}, split train: found digest " in said
    results = json.loads(captured.out)
    (change,) = results["data_changed"]
    (entry,) = own.registry.resolve("ppo").manifest.data
    assert change["model"] == "ppo@v1" and change["source"] == FILE and change["split"] == "train"
    assert change["expected"] == entry.digest != change["found"] and change["expected_rows"] == entry.rows
    assert change["rows"] < entry.rows and change["found"][:12] in said and entry.digest[:12] in said
    assert [line["text"] for line in results["verdict"]["lines"] if line["topic"] == "data"] == [change["text"]]
    assert "have changed since it was trained" in Path(results["report"]).read_text()


def test_data_that_are_what_they_were_are_passed_over(capsys, own, undrawn):
    assert compare(own) == 0
    captured = capsys.readouterr()
    assert "have changed" not in captured.err and json.loads(captured.out)["data_changed"] == []
    cut()
    assert compare(own, "--prompts", "collected:pairs") == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 4


@pytest.mark.parametrize("words", [("evaluate", "dpo"), ("evaluate", "reward@v2"), ("generate", "dpo")])
def test_evaluation_and_generation_say_it_too(capsys, own, words):
    options = ("--max-prompts", "2", "--samples", "1", "--home", str(own.home), "--json")
    assert main([*words, *options]) == 0
    captured = capsys.readouterr()
    assert "have changed" not in captured.err and json.loads(captured.out)["data_changed"] == []
    cut()
    assert main([*words, *options]) == 0
    captured = capsys.readouterr()
    assert " ".join(captured.err.split()).count("have changed since it was trained") == 1
    assert [change["source"] for change in json.loads(captured.out)["data_changed"]] == [FILE]


@pytest.mark.parametrize(
    ("words", "whose"), [(("evaluate", "dpo"), "dpo@v1"), (("evaluate", "reward@v2"), "reward@v2")]
)
def test_data_that_are_not_there_are_somebodys(capsys, own, words, whose):
    Path(FILE).unlink()
    assert main([*words, "--home", str(own.home)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {FILE}: no such file or directory")
    assert f"the data of {whose} (named in its manifest)" in error and "--prompts SOURCE" in error


def test_the_remedy_of_missing_data_works(capsys, own, undrawn):
    Path(FILE).unlink()
    assert compare(own) == 2
    assert "the data of ppo@v1 (named in its manifest)" in capsys.readouterr().err
    assert compare(own, "--prompts", "collected:pairs") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["preferences"] is None
    assert "note: no held-out pairs" in captured.err and "the data of dpo@v1" in captured.err


class Source:
    """Records of one source, as they were read."""

    def __init__(self, source: str, *texts: str):
        self.source = source
        self.records = [Record("text", None, (text,), split=split) for text in texts for split in ("train", "test")]


def manifest_of(lab: Lab, *entries: dict) -> object:
    """A model whose manifest has such data."""
    from dataclasses import replace

    from rlhf_pipeline.registry.manifest import DataEntry

    model = lab.registry.resolve("sft")
    data = [DataEntry(**{"rows": 1, **entry}) for entry in entries]
    return replace(model, manifest=model.manifest.model_copy(update={"data": data}))


def test_each_split_is_compared_with_the_entry_of_the_same(tiny):
    now = Source("a.jsonl", "one")
    entry = {"source": "a.jsonl", "split": "train", "digest": records_digest(now.records[:1])}
    assert changes_of(manifest_of(tiny, entry), [now]) == []
    assert changes_of(manifest_of(tiny, entry), [Source("b.jsonl", "two")]) == []  # another source
    (gone,) = changes_of(manifest_of(tiny, entry | {"split": "judge"}), [now])
    assert gone.found is None and "split judge: found no rows" in gone.text
    changes = changes_of(manifest_of(tiny, entry, entry | {"split": "test", "digest": "0" * 64}), [now])
    assert [change.split for change in changes] == ["test"]
    known: list = []
    assert note_changes(known, changes) == changes and note_changes(known, changes) == [] and known == changes
    parts = [Source("a.jsonl", "two"), now]  # of a mixture of two parts of one source
    assert changes_of(manifest_of(tiny, entry), parts) == []
    world = {"source": "world:verdicts", "split": "train", "digest": "0" * 64}
    assert changes_of(manifest_of(tiny, world), [Source("world:verdicts", "one")]) == []


def test_another_version_of_collected_data_is_a_change(tiny):
    entry = {"source": "collected:p@v1", "split": "train", "digest": "0" * 64}
    (change,) = changes_of(manifest_of(tiny, entry), [Source("collected:p@v2", "one")])
    assert "collected:p@v2, split train" in change.text and "of collected:p@v1" in change.text


def test_collected_pairs_that_are_not_there_are_somebodys(capsys, lab):
    shutil.rmtree(lab.home / "data")
    assert main(["evaluate", "reward", "--home", str(lab.home)]) == 2
    assert "these are the data of reward@v1 (named in its manifest)" in " ".join(capsys.readouterr().err.split())


def test_the_reference_is_cached_by_all_its_weights_and_the_type_they_are_read_in(monkeypatch):
    """Two bases below equal adapter files are two references; a policy that is read in fp32 has none in bf16."""
    reference = SimpleNamespace(digest="adapter", identity="adapter on base")
    monkeypatch.setattr(training_loss, "dpo_reference", lambda *_: reference)
    monkeypatch.setattr(training_loss, "training_temperature", lambda _: 1.0)
    bench = SimpleNamespace(registry=None, config=SimpleNamespace(dtype="float32"), policy=lambda *_, **__: None)
    model = SimpleNamespace(manifest=SimpleNamespace(parents={}), config={"dtype": "bfloat16"})
    *_, key = training_loss.dpo_policies(bench, model)
    assert key == {"model": "adapter on base", "dtype": "float32", "bf16": False}
