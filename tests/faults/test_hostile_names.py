from __future__ import annotations

import json
import os
import re

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.names import is_name
from rlhf_pipeline.registry.digests import MANIFEST, list_files
from rlhf_pipeline.registry.store import Registry
from tests.faults.hostile_names import NAMES, OBEYED, WAYS, attack, command, make_place, tree

FEW = 6  # of every so many names one is used in a given way; `hostile_names` uses all in all ways


@pytest.fixture
def place(tmp_path):
    """See `make_place`."""
    (tmp_path / "place").mkdir()
    return make_place(tmp_path / "place")


def test_there_are_enough_of_them_and_none_is_a_name() -> None:
    assert len(NAMES) >= 200
    assert not [name for name in NAMES if is_name(name)]


@pytest.mark.parametrize("number", range(len(WAYS)))
def test_a_hostile_name_is_refused_and_touches_nothing(place, number) -> None:
    assert attack(place, list(WAYS)[number], NAMES[number % FEW :: FEW]) == []


def test_a_name_with_a_newline_at_its_end_is_not_that_name(place) -> None:
    before = tree(place)
    for way in ("reference", "remove", "repair", "export", "collected", "report"):
        assert attack(place, way, ["sft\n", "pairs\n", "sft@v1\n", "\tsft"]) == []
    assert tree(place) == before


def test_hostile_paths_in_a_manifest_reach_nothing(place, tmp_path) -> None:
    version = place / "home/models/sft/v1"
    manifest = version / MANIFEST
    original = manifest.read_text()
    fields = json.loads(original)
    del fields["format"], fields["manifest_sha256"]  # what has no seal is read as an old manifest
    entry = fields["files"]["model.safetensors"]
    before = {path: state for path, state in tree(place).items() if path != str(manifest)}
    paths = [*NAMES[::FEW], "../../../../canary/bird", str(place / "canary/bird"), "snapshots/../../../canary/bird"]
    try:
        for path in paths:
            text = json.dumps({**fields, "files": {**fields["files"], path: entry}})
            manifest.write_text(text)
            for words in (("show", "sft@v1#1"), ("verify",), ("export", "sft", str(tmp_path / "out"))):
                code, said = command(place, "models", *words)
                assert code == 2, (path, words, said)
            assert not (tmp_path / "out").exists()
            assert {found: state for found, state in tree(place).items() if found != str(manifest)} == before, path
    finally:
        manifest.write_text(original)


def test_hostile_aliases_name_nothing(place) -> None:
    aliases = place / "home/models/sft/aliases.json"
    original = aliases.read_text()
    before = tree(place)
    try:
        for name in NAMES[:: 2 * FEW]:
            for content in ({"best": name}, {name: "v1"}, {"best": [name]}, {"best": {name: 1}}, [name]):
                aliases.write_text(json.dumps(content))
                for words, codes in ((("show", "sft@best"), (2,)), (("list",), (0, 2))):
                    code, said = command(place, "models", *words)
                    assert code in codes and not OBEYED.search(said), (content, said)
                assert Registry(place / "home").resolve("sft@v1").version == 1
    finally:
        aliases.write_text(original)
    assert tree(place) == before


def test_hostile_folders_in_a_home_are_no_models(place) -> None:
    """What somebody else has put there is not listed, shown or obeyed."""
    models = place / "home/models"
    made = []
    for name in NAMES:
        try:
            folder = models / name
            if folder.parent != models or folder.exists():
                continue
            (folder / "v1").mkdir(parents=True)
            made.append(folder)
        except (OSError, ValueError):  # too long, or a character that no file has
            continue
    try:
        listed = {name for name in Registry(place / "home").models.names() if name != "sft"}
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) for name in listed)
        assert command(place, "models", "list")[0] == 0
    finally:
        for folder in made:
            (folder / "v1").rmdir()
            folder.rmdir()


@pytest.mark.parametrize("kind", ["full", "file", "link", "empty link", "below a file", "nul", "long"])
def test_exporting_over_something_is_refused(place, tmp_path, kind) -> None:
    target = tmp_path / "target"
    if kind == "full":
        target = place / "canary"
    elif kind == "file":
        target.write_text("x")
    elif kind == "link":
        target.symlink_to(place / "canary")
    elif kind == "empty link":
        (tmp_path / "empty").mkdir()
        target.symlink_to(tmp_path / "empty")
    elif kind == "below a file":
        target.write_text("x")
        target = target / "out"
    name = {"nul": "a\0b", "long": "a" * 5000}.get(kind, str(target))
    before = tree(place, tmp_path)
    code, said = command(place, "models", "export", "sft", name)
    assert code == 2 and "unexpected" not in said, said
    assert tree(place, tmp_path) == before


def test_a_home_with_control_characters_is_refused(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for home in ("a\0b", "a\nb", "\x1b[31m"):
        assert main(["models", "list", "--home", home]) == 2
        assert not OBEYED.search(capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_a_published_version_holds_only_its_own_files(place) -> None:
    """A writer that climbs out of its folder is a fault of ours, not of a name: what is listed is what lies below."""
    registry = Registry(place / "home")
    with pytest.raises(ValueError, match="nothing was written"):
        registry.publish("other", "sft", lambda folder: None)
    assert set(list_files(registry.resolve("sft").path)) == {"README.md", "config.json", "model.safetensors"}
