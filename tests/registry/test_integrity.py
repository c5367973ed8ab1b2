from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.repair import registry_faults

# sha256 of "weights" and of "WEIGHTS", from `printf weights | sha256sum`
WEIGHTS = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
CHANGED = "14422b042349bd2e1e537c361c780005f69282015a7d8c36312293ab017b0b36"


@pytest.fixture
def made(registry, model):
    return registry.publish("demo", "sft", model(steps=(5,)))


def test_untouched_version_passes(registry, made):
    verify_files(made)
    assert registry_faults(registry) == registry_faults(registry, "demo@v1") == []


def test_changed_file_of_the_same_size_names_both_digests(registry, made):
    (made.path / "model.safetensors").write_text("WEIGHTS")
    with pytest.raises(DamagedFile) as error:
        verify_files(made)
    for word in ("demo@v1", "model.safetensors", WEIGHTS, CHANGED):
        assert word in str(error.value)
    assert [fault.where for fault in registry_faults(registry)] == ["demo@v1: model.safetensors"]


def test_cut_missing_and_added_files_are_all_named(registry, made):
    (made.path / "model.safetensors").write_text("wei")
    (made.path / "config.json").unlink()
    (made.path / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedFile) as error:
        verify_files(made)
    text = str(error.value)
    assert "model.safetensors: 3 bytes; expected 7 bytes" in text
    assert "config.json: missing" in text
    assert "adapter_config.json: not in manifest.json" in text
    assert len(registry_faults(registry, "demo")) == 3


def test_card_and_snapshots_do_not_stop_loading_but_are_reported(registry, made):
    (made.path / "README.md").write_text("edited")
    (made.path / "snapshots/step-5/model.safetensors").write_text("edited")
    verify_files(made)
    assert len(registry_faults(registry)) == 2
    with pytest.raises(DamagedFile, match=r"demo@v1#5: model\.safetensors"):
        verify_files(registry.resolve("demo@v1#5"))


def test_damaged_manifest_is_reported_and_refused_and_listed(registry, made):
    (made.path / "manifest.json").write_text("{}")
    assert "manifest.json: not a valid manifest" in str(registry_faults(registry)[0])
    assert [(item.label, item.manifest) for item in registry.models.all()] == [("demo@v1", None)]
    with pytest.raises(DamagedFile):
        registry.resolve("demo")


def test_moved_version_and_dangling_alias_are_reported(registry, made):
    registry.alias("demo@v1", "best")
    shutil.move(made.path, made.path.with_name("v7"))
    assert [fault.where for fault in registry_faults(registry)] == ["demo@v7: manifest.json", "demo@best"]


def test_data_are_checked_too(registry):
    made = registry.publish_data("pairs", [{"prompt": "x"}])
    verify_files(made)
    (made.path / "records.jsonl").write_text("{}\n")
    with pytest.raises(DamagedFile, match=r"records\.jsonl: 3 bytes; expected 16 bytes"):
        verify_files(made)
    assert len(registry_faults(registry)) == 1


def test_files_are_hashed_once_before_loading_and_each_time_by_verify(registry, made, monkeypatch):
    from rlhf_pipeline.disk import stamps
    from rlhf_pipeline.registry import digests, integrity

    hashed: Counter[str] = Counter()
    monkeypatch.setattr(stamps, "SETTLED", 0)
    reading = counted(digests.file_sha256, hashed)
    for module in (digests, integrity):
        monkeypatch.setattr(module, "file_sha256", reading)
    verify_files(made)
    verify_files(registry.resolve("demo"))
    assert hashed == {"config.json": 1, "model.safetensors": 1}
    hashed.clear()
    for _ in range(2):
        assert registry_faults(registry) == []
    assert hashed["model.safetensors"] == 4  # that of the version and that of its snapshot, twice
    path = made.path / "model.safetensors"
    before = path.stat()
    path.write_text("WEIGHTS")  # as many bytes, at the same time as far as the file says
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedFile, match=CHANGED):
        verify_files(made)


def counted(function: Callable[[Path], str], counts: Counter[str]) -> Callable[[Path], str]:
    """The function, counting its calls by the name of the file."""

    def call(path: Path) -> str:
        counts[path.name] += 1
        return function(path)

    return call
