from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.errors import BadInput, RunFailed, UnknownReference
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.manifest import DataEntry
from rlhf_pipeline.registry.repair import registry_faults, repair


@pytest.fixture
def two(registry, model):
    """demo@v1 and demo@v2; @best and @last name the second, @first the first."""
    made = [registry.publish("demo", "sft", model(weights, steps=(5,))) for weights in ("one", "two")]
    for alias, version in (("first", 1), ("best", 2), ("last", 2)):
        registry.alias(f"demo@v{version}", alias)
    return made


def quarantine(registry):
    folder = registry.home / "quarantine"
    return sorted(path for path in folder.iterdir() if path.name != ".lock") if folder.is_dir() else []


def test_a_damaged_version_goes_whole_and_the_one_before_is_found(registry, model, two):
    (two[1].path / "model.safetensors").write_text("twx")
    before = sorted(path.relative_to(two[1].path) for path in two[1].path.rglob("*"))
    done = repair(registry)
    (aside,) = quarantine(registry)
    assert aside.name.startswith("demo-v2-2")
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == before
    assert (aside / "model.safetensors").read_text() == "twx"
    assert [(one.what, one.done) for one in done] == [
        ("demo@v2", "quarantined"),
        ("demo@best", "removed: it named v2"),
        ("demo@last", "removed: it named v2"),
        ("demo", "is now demo@v1"),
    ]
    assert done[0].path == str(aside)
    assert registry.resolve("demo").label == registry.resolve("demo@first").label == "demo@v1"
    assert registry.models.aliases("demo") == {"first": 1}
    assert registry_faults(registry) == [] and repair(registry) == []
    with pytest.raises(UnknownReference, match="v2 was damaged and is in quarantine"):
        registry.resolve("demo@v2")
    assert registry.publish("demo", "sft", model()).label == "demo@v3"


def test_the_latest_version_is_told_only_where_it_has_changed(registry, two):
    (two[0].path / "model.safetensors").write_text("onx")
    assert [str(one.what) for one in repair(registry)] == ["demo@v1", "demo@first"]
    (two[1].path / "model.safetensors").write_text("twx")
    assert repair(registry)[-1].done == "has no version left"


@pytest.mark.parametrize("damage", ["unreadable", "gone", "flipped", "elsewhere"])
def test_a_damaged_manifest_is_a_damaged_version(registry, two, damage):
    manifest = two[1].path / "manifest.json"
    if damage == "gone":
        manifest.unlink()
    elif damage == "elsewhere":
        shutil.move(two[1].path, two[1].path.with_name("v7"))
    else:
        text = manifest.read_text()
        manifest.write_text("{" if damage == "unreadable" else text.replace('"size": 3', '"size": 2', 1))
    number = 7 if damage == "elsewhere" else 2
    assert repair(registry)
    assert quarantine(registry)[0].name.startswith(f"demo-v{number}-")
    assert registry.models.numbers("demo") == [1] and registry_faults(registry) == []


def test_one_reference_is_repaired_and_the_others_stay(registry, two):
    for item in two:
        (item.path / "model.safetensors").write_text("abc")
    (two[1].path / "manifest.json").write_text("{")
    repair(registry, "demo@best")
    assert registry.models.numbers("demo") == [1]
    assert len(registry_faults(registry)) == 1
    repair(registry, "demo")
    assert registry.models.numbers("demo") == [] and len(quarantine(registry)) == 2
    with pytest.raises(UnknownReference, match="damaged and in quarantine: v1, v2"):
        registry.resolve("demo")


def test_a_card_is_written_again_and_what_is_not_of_the_version_is_put_aside(registry, two):
    (two[0].path / "README.md").write_text("edited")
    (two[1].path / "README.md").unlink()
    (two[1].path / "adapter_config.json").write_text("{}")
    done = [(one.what, one.done) for one in repair(registry)]
    assert ("demo@v1: README.md", "written again") in done and ("demo@v2: README.md", "written again") in done
    assert ("demo@v2: adapter_config.json", "not part of this version: quarantined") in done
    assert sorted(path.read_text() for path in quarantine(registry)) == ["edited", "{}"]
    assert registry_faults(registry) == [] and registry.models.numbers("demo") == [1, 2]


def test_a_link_in_the_place_of_a_file_is_damage(registry, two, tmp_path):
    weights = two[1].path / "model.safetensors"
    shutil.move(weights, tmp_path / "weights")
    os.symlink(tmp_path / "weights", weights)
    os.symlink(tmp_path, two[0].path / "additional_chat_templates")
    assert [fault.found for fault in registry_faults(registry)] == ["not in manifest.json", "a symbolic link"]
    repair(registry)
    assert registry_faults(registry) == [] and registry.models.numbers("demo") == [1]
    assert (tmp_path / "weights").read_text() == "two"


def test_damaged_aliases_and_numbers_are_put_aside(registry, model, two):
    registry.remove("demo@v2", force=True)
    registry.publish("dpo", "dpo", model(), data=[DataEntry(source="x", digest="d", rows=1)], parents={"base": two[1]})
    for name in ("aliases.json", "removed.json"):
        (registry.home / "models/demo" / name).write_text('{"x": ')
    assert registry_faults(registry) != []
    done = [one.what for one in repair(registry)]
    assert done == ["demo: removed.json", "demo: aliases.json"]
    assert registry_faults(registry) == [] and len(quarantine(registry)) == 2
    # v2 is known from the model that came of it: its number is not given to another.
    assert registry.publish("demo", "sft", model()).label == "demo@v3"


@pytest.mark.parametrize("content", ['{"versions": ["2"]}', '{"versions": 2}', "[]", '{"versions": [0]}'])
def test_removed_versions_that_are_no_numbers_are_a_fault(registry, two, content):
    (registry.home / "models/demo/removed.json").write_text(content)
    assert "removed.json" in str(registry_faults(registry)[0])


def test_an_alias_that_names_nothing_is_removed(registry, two):
    aliases = registry.home / "models/demo/aliases.json"
    aliases.write_text(json.dumps({"best": "v9", "first": "v1"}))
    assert [str(one) for one in repair(registry)] == ["demo@best: removed: it named v9, which does not exist"]
    assert registry.models.aliases("demo") == {"first": 1}


def test_data_are_repaired_too(registry):
    made = registry.publish_data("pairs", [{"prompt": "x"}])
    (made.path / "records.jsonl").write_text("{}\n")
    assert len(registry_faults(registry, "collected:pairs")) == 1
    repair(registry, "collected:pairs")
    assert registry.data.numbers("pairs") == [] and quarantine(registry)[0].name.startswith("pairs-v1-")
    assert registry.publish_data("pairs", [{"prompt": "x"}]).label == "pairs@v2"


def test_what_is_no_version_is_not_repaired(registry, two, tmp_path):
    folder = registry.export("demo", tmp_path / "out")
    for text in (str(folder), "demo@v1#5"):
        with pytest.raises(BadInput, match="--repair needs a version"):
            repair(registry, text)
    with pytest.raises(UnknownReference):
        repair(registry, "nothing")


def test_a_repair_that_was_killed_halfway_is_finished_by_the_next(registry, two, monkeypatch):
    (two[1].path / "model.safetensors").write_text("twx")

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_pipeline.registry.repair._put_aside", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(registry)
    monkeypatch.undo()
    assert registry.models.numbers("demo") == [1, 2]
    repair(registry)
    assert registry.models.numbers("demo") == [1] and registry_faults(registry) == []


def test_the_command_says_what_it_did(registry, two, capsys):
    home = ["--home", str(registry.home)]
    (two[1].path / "model.safetensors").write_text("twx")
    assert main(["models", "verify", *home]) == 2
    assert "demo@v2: model.safetensors: sha256" in capsys.readouterr().out
    assert main(["models", "verify", "--repair", "--json", *home]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["faults"] == [] and len(found["repaired"]) == 4
    assert main(["models", "verify", *home]) == 0
    assert main(["models", "verify", "--repair", "demo", *home]) == 0
    assert capsys.readouterr().out.count("all files match their manifests") == 2
    verify_files(registry.resolve("demo"))
    (two[0].path / "manifest.json").unlink()
    assert main(["models", "verify", "demo", *home]) == 2
    assert "manifest.json: missing" in capsys.readouterr().out
    assert main(["models", "verify", "demo", "--repair", *home]) == 0
    assert "demo: has no version left" in capsys.readouterr().out


def state(registry):
    folder = registry.home / "models/demo"
    return {path.name: path.read_text() for path in folder.glob("*.json")}, sorted(folder.glob("v*"))


@pytest.mark.parametrize("seen", ["by its number", "by the rename"])
def test_a_quarantine_on_another_disk_is_one_line_and_changes_nothing(registry, two, monkeypatch, seen):
    (two[1].path / "model.safetensors").write_text("twx")
    (registry.home / "quarantine").mkdir()
    before = state(registry)
    if seen == "by the rename":

        def rename(source, target):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))

        monkeypatch.setattr(os, "rename", rename)
    else:
        real = os.lstat(two[1].path)
        other = os.stat_result([*real[:2], real.st_dev + 1, *real[3:]])
        lstat = Path.lstat
        monkeypatch.setattr(Path, "lstat", lambda path: other if path == two[1].path else lstat(path))
    with pytest.raises(RunFailed, match="another disk") as caught:
        repair(registry)
    assert "\n" not in str(caught.value) and str(two[1].path) in str(caught.value)
    after = state(registry)
    assert after[1] == before[1] and after[0]["aliases.json"] == before[0]["aliases.json"]
    assert seen == "by the rename" or after == before
    monkeypatch.undo()
    assert next(iter(repair(registry))).done == "quarantined"
