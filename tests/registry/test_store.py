from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import BadInput, DamagedFile, UnknownReference
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.manifest import DataEntry, Parent
from rlhf_pipeline.registry.repair import registry_faults, repair


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Publishing


def test_version_lies_where_the_contract_says(registry, model):
    made = registry.publish("demo", "sft", model(), config={"seed": 1}, seed=1)
    folder = registry.home / "models" / "demo" / "v1"
    assert made.path == folder
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["name"], manifest["version"], manifest["stage"], manifest["seed"]) == (
        "demo",
        1,
        "sft",
        1,
    )
    assert set(manifest["files"]) == {"README.md", "config.json", "model.safetensors"}
    assert manifest["files"]["model.safetensors"]["size"] == len("weights")
    assert manifest["code"]["package"]
    assert manifest["environment"]["python"].count(".") == 2
    assert made.manifest == registry.resolve("demo").manifest


def test_digest_depends_on_files_alone(registry, model):
    first = registry.publish("a", "sft", model("w"))
    again = registry.publish("b", "dpo", model("w"), seed=5)
    other = registry.publish("a", "sft", model("x"))
    assert first.digest == again.digest != other.digest
    assert (first.label, again.label, other.label) == ("a@v1", "b@v1", "a@v2")


def test_a_reserved_number_waits_for_its_run(registry, model):
    shelf = registry.models
    assert registry.publish("demo", "sft", model()).label == "demo@v1"
    assert [shelf.reserve("demo", run) for run in ("one", "two", "one", "three")] == [2, 3, 2, 4]
    # Others pass over them; whichever ends first has its own.
    assert registry.publish("demo", "sft", model()).label == "demo@v5"
    assert registry.publish("demo", "sft", model(), number=3).label == "demo@v3"
    assert shelf.reserved("demo") == {"one": 2, "three": 4}
    assert registry.publish("demo", "sft", model(), number=3).label == "demo@v6"  # it is taken
    assert registry.resolve("demo").label == "demo@v6"
    # The number of a removed version is not given to its run again.
    registry.publish("demo", "sft", model(), number=2)
    registry.remove("demo@v2")
    assert shelf.reserve("demo", "one") == 7
    registry.publish("demo", "sft", model(), number=7)
    registry.publish("demo", "sft", model(), number=4)
    assert not (registry.home / "models/demo/reserved.json").exists()
    # A number that nobody has reserved is not for the asking.
    assert registry.publish("demo", "sft", model(), number=40).label == "demo@v8"
    assert registry.data.reserve("demo", "one") == 1


def test_a_damaged_file_of_reserved_numbers_is_put_aside(registry, model):
    registry.publish("demo", "sft", model())
    path = registry.home / "models/demo/reserved.json"
    path.write_text('{"one": 0}')
    for found in (lambda: registry.models.reserve("demo", "two"), lambda: registry.publish("demo", "sft", model())):
        with pytest.raises(DamagedFile, match=r"reserved\.json: expected the number of a version.*remove it"):
            found()
    assert [fault.where for fault in registry_faults(registry)] == ["demo"]
    assert [one.what for one in repair(registry)] == ["demo: reserved.json"]
    assert registry.models.reserve("demo", "two") == 2 and registry_faults(registry) == []


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../a", "x" * 65, "a b", "ä"])
def test_names_outside_the_rule_are_refused(registry, model, name):
    with pytest.raises(BadInput, match="not allowed"):
        registry.publish(name, "sft", model())
    assert not registry.home.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_appears_where_writing_fails(registry, model, error):
    def write(folder):
        model()(folder)
        raise error

    with pytest.raises(error):
        registry.publish("demo", "sft", write)
    assert everything_under(registry.home / "models") == []
    assert registry.models.all() == []


def test_nothing_appears_where_the_process_is_killed(registry):
    code = f"""
        import os, signal
        from rlhf_pipeline.registry.store import Registry

        def write(folder):
            (folder / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        Registry({str(registry.home)!r}).publish("demo", "sft", write)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert registry.models.names() == []
    with pytest.raises(UnknownReference):
        registry.resolve("demo")


def test_concurrent_publishers_get_a_version_each(registry, model):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: registry.publish("demo", "sft", model(f"w{i}")), range(8)))
    assert sorted(item.version for item in made) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert registry_faults(registry) == []
    for i, item in enumerate(made):
        assert (item.path / "model.safetensors").read_text() == f"w{i}"
    assert not [path for path in everything_under(registry.home) if path.endswith(".tmp")]


def test_collected_data_are_rows_with_a_manifest(registry, model):
    judge = registry.publish("judge", "reward", model())
    rows = [{"prompt": "é", "chosen": "a\nb", "rejected": "c"}, {"prompt": "p", "label_probability": 0.75}]
    made = registry.publish_data("pairs", rows, parents={"judge": judge}, tokenizer_digest="t")
    folder = registry.home / "data" / "pairs" / "v1"
    assert sorted(os.listdir(folder)) == ["manifest.json", "records.jsonl"]
    assert [json.loads(line) for line in (folder / "records.jsonl").read_text("utf-8").splitlines()] == rows
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokenizer_digest"] == "t"
    assert manifest["parents"]["judge"] == {"ref": "judge@v1", "digest": judge.digest}
    assert registry.resolve_data("pairs").label == made.label == "pairs@v1"


# Looking up


def test_name_version_alias_and_snapshot(registry, model):
    for weights in ("one", "two"):
        registry.publish("demo", "sft", model(weights, steps=(10, 20)))
    registry.alias("demo@v1", "best")
    assert registry.resolve("demo").label == "demo@v2"
    assert registry.resolve("demo@v1").version == registry.resolve("demo@best").version == 1
    snapshot = registry.resolve("demo@best#20")
    assert snapshot.label == "demo@v1#20"
    assert (snapshot.path / "model.safetensors").read_text() == "one step-20"
    assert snapshot.digest not in (None, registry.resolve("demo@v1").digest)
    verify_files(snapshot)


def test_versions_are_ordered_by_number(registry, model):
    for _ in range(11):
        registry.publish("demo", "sft", model())
    assert registry.resolve("demo").version == 11


def test_order_is_registry_then_folder_then_hub(registry, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "org/name"):
        (tmp_path / name).mkdir(parents=True)
        model("folder")(tmp_path / name)
    assert registry.resolve("demo").kind == "directory"
    registry.publish("demo", "sft", model())
    assert registry.resolve("demo").kind == "registry"
    assert registry.resolve("./demo").kind == "directory"
    assert registry.resolve("org/name").kind == "directory"
    hub = registry.resolve("org/other", revision="main")
    assert (hub.kind, hub.label) == ("hub", "org/other@main")
    assert registry.resolve("org/other@abc", revision="main").revision == "abc"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dmeo", "did you mean 'demo'"),
        ("unlike", "there are demo"),
        ("demo@v9", "no version v9; there are v1, best \\(v1\\)"),
        ("demo@bset", "no alias 'bset'.*did you mean 'best'"),
        ("demo@v1#5", "no snapshot of step 5; there are steps 10, 20"),
        ("./nowhere", "not a folder"),
        ("a/b/c", "not a hub id"),
    ],
)
def test_unknown_references_say_what_there_is(registry, model, text, said):
    registry.publish("demo", "sft", model(steps=(10, 20)))
    registry.alias("demo", "best")
    with pytest.raises(UnknownReference, match=said):
        registry.resolve(text)


def test_gguf_weights_alone_are_refused_with_the_way_to_convert_them(registry, model, tmp_path):
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"GGUF weights \(model.Q4.gguf\).*gguf_file='model.Q4.gguf'.*dequantize=True"):
        registry.resolve(tmp_path)
    model()(tmp_path)  # safetensors beside it
    assert registry.resolve(tmp_path).kind == "directory"


def test_folder_without_a_config_is_no_model(registry, tmp_path):
    with pytest.raises(UnknownReference, match=r"without config\.json"):
        registry.resolve(tmp_path)


def test_unknown_data(registry):
    registry.publish_data("pairs", [{"prompt": "x"}])
    with pytest.raises(UnknownReference, match="did you mean 'pairs'"):
        registry.resolve_data("pars")
    with pytest.raises(UnknownReference, match="no version v2; there are v1"):
        registry.resolve_data("pairs@v2")


def test_finished_stage_is_found_by_config_parents_and_data(registry, model):
    base = registry.publish("sft", "sft", model("base"))
    data = [DataEntry(source="x", digest="d1", rows=2), DataEntry(source="y", digest="d2", rows=2)]
    fields = {"config_digest": "c", "parents": {"policy": base}, "data": data}
    for _ in range(2):
        registry.publish("dpo", "dpo", model("w"), **fields)
    same = ("dpo", "c", {"policy": base.digest}, ["d2", "d1"])
    assert registry.find(*same).label == "dpo@v2"
    assert registry.find(*same, name="dpo").label == "dpo@v2"
    assert registry.find(*same, name="other") is None
    assert registry.find("ppo", *same[1:]) is None
    assert registry.find("dpo", "c2", *same[2:]) is None
    assert registry.find("dpo", "c", {"policy": "other"}, ["d1", "d2"]) is None
    assert registry.find("dpo", "c", {}, ["d1", "d2"]) is None
    assert registry.find("dpo", "c", {"policy": base.digest}, ["d1"]) is None


def test_collected_data_are_found_too(registry, model):
    policy = registry.publish("sft", "sft", model())
    made = registry.publish_data("pairs", [{"prompt": "x"}], config_digest="c", parents={"policy": policy})
    assert registry.find("collect", "c", {"policy": policy.digest}, []).label == made.label


# Changing


def test_alias_moves_and_others_stay(registry, model):
    for _ in range(2):
        registry.publish("demo", "sft", model())
    registry.alias("demo@v1", "best")
    registry.alias("demo@v1", "first")
    registry.alias("demo@v2", "best")
    assert json.loads((registry.home / "models/demo/aliases.json").read_text()) == {
        "best": "v2",
        "first": "v1",
    }


def test_concurrent_aliases_all_stay(registry, model):
    registry.publish("demo", "sft", model())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: registry.alias("demo@v1", f"a{i}"), range(8)))
    assert registry.models.aliases("demo") == {f"a{i}": 1 for i in range(8)}


@pytest.mark.parametrize("alias", ["v3", "a b", "", "a@b"])
def test_aliases_outside_the_rule_are_refused(registry, model, alias):
    registry.publish("demo", "sft", model())
    with pytest.raises(BadInput, match="alias"):
        registry.alias("demo", alias)


def test_damaged_aliases_stop_only_aliases(registry, model):
    registry.publish("demo", "sft", model())
    (registry.home / "models/demo/aliases.json").write_text("{")
    assert registry.resolve("demo@v1").version == 1
    with pytest.raises(DamagedFile, match=r"aliases\.json"):
        registry.resolve("demo@best")
    assert "aliases.json" in str(registry_faults(registry)[0])


def test_what_is_in_use_is_not_removed(registry, model):
    base = registry.publish("sft", "sft", model(steps=(5,)))
    registry.publish("dpo", "dpo", model(), parents={"policy": registry.resolve("sft@v1#5")})
    registry.publish_data("pairs", [{"prompt": "x"}], parents={"policy": base})
    registry.alias("sft", "best")
    with pytest.raises(BadInput, match=r"a parent of dpo@v1, pairs@v1 and the alias best names it.*--force"):
        registry.remove("sft@v1")
    assert registry.resolve("sft").version == 1
    registry.remove("sft@v1", force=True)
    assert registry.models.names() == ["dpo"]
    assert registry.models.aliases("sft") == {}


def test_number_of_a_removed_version_is_not_used_again(registry, model):
    for _ in range(2):
        registry.publish("demo", "sft", model())
    assert registry.remove("demo").label == "demo@v2"
    assert registry.publish("demo", "sft", model()).label == "demo@v3"
    registry.remove("demo@v1")
    registry.remove("demo@v3")
    assert registry.publish("demo", "sft", model()).label == "demo@v4"


@pytest.mark.parametrize("text", ["org/name", "demo@v1#5"])
def test_only_versions_are_removed_or_named(registry, model, text):
    registry.publish("demo", "sft", model(steps=(5,)))
    with pytest.raises(BadInput, match="needs a version of the registry"):
        registry.remove(text)
    with pytest.raises(BadInput, match="needs a version of the registry"):
        registry.alias(text, "best")


def test_export_is_a_plain_model_with_its_origin(registry, model, tmp_path):
    made = registry.publish("demo", "sft", model(steps=(5,)), parents={"init": Parent(ref="org/x")})
    target = registry.export("demo", tmp_path / "out" / "demo")
    assert everything_under(target) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    exported = registry.resolve(target)
    assert (exported.kind, exported.digest, exported.stage) == ("directory", made.digest, "sft")
    assert exported.manifest.parents == made.manifest.parents
    verify_files(exported)
    (target / "model.safetensors").write_text("changed")
    with pytest.raises(DamagedFile, match=r"delete manifest\.json"):
        verify_files(exported)


def test_export_of_a_snapshot(registry, model, tmp_path):
    registry.publish("demo", "sft", model("w", steps=(5,)))
    target = registry.export("demo@v1#5", tmp_path / "out")
    assert (target / "model.safetensors").read_text() == "w step-5"
    assert registry.resolve(target).digest == registry.resolve("demo@v1#5").digest


def test_export_overwrites_nothing(registry, model, tmp_path):
    registry.publish("demo", "sft", model())
    empty = tmp_path / "empty"
    empty.mkdir()
    registry.export("demo", empty)
    with pytest.raises(BadInput, match="not empty"):
        registry.export("demo", empty)
    with pytest.raises(BadInput, match="not in the registry"):
        registry.export(str(empty), tmp_path / "other")


def test_a_copy_replaces_an_earlier_copy_of_its_name_and_nothing_else(registry, model, tmp_path):
    target = tmp_path / "out"
    for weights in ("first", "second"):
        made = registry.publish("demo", "sft", model(weights))
        registry.export(made.label, target, replace=True)
        assert (target / "model.safetensors").read_text() == weights
    registry.publish("other", "sft", model("other"))
    with pytest.raises(BadInput, match="or one with a copy of other"):
        registry.export("other", target, replace=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    with pytest.raises(BadInput, match="exists and is not empty"):
        registry.export("demo", tmp_path / "mine", replace=True)
    assert (target / "model.safetensors").read_text() == "second" and (tmp_path / "mine" / "notes.txt").exists()


def test_damaged_version_is_not_exported(registry, model, tmp_path):
    made = registry.publish("demo", "sft", model())
    (made.path / "model.safetensors").write_text("WEIGHTS")
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        registry.export("demo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_two_that_remove_a_version_the_second_is_told_so(registry, model, monkeypatch):
    registry.publish("sft", "sft", model("one"))
    registry.publish("sft", "sft", model("two"))
    found = registry.resolve("sft@v2")
    registry.remove("sft@v2")
    monkeypatch.setattr(registry, "resolve", lambda text: found)  # it looked before the other one had removed it
    before = (registry.home / "models/sft/removed.json").read_text()
    with pytest.raises(UnknownReference, match="sft@v2 has just been removed"):
        registry.remove("sft@v2")
    assert (registry.home / "models/sft/removed.json").read_text() == before


def test_a_removal_is_brought_to_disk(registry, model, monkeypatch):
    registry.publish("sft", "sft", model())
    folder, synced = registry.home / "models/sft", []
    real = storage.sync

    def sync(path):
        synced.append((path, (folder / "v1").exists()))
        real(path)

    monkeypatch.setattr(storage, "sync", sync)
    registry.remove("sft@v1")
    assert {(folder, False), (folder.parent, False)} <= set(synced)
