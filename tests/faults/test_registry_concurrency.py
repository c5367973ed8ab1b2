from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_pipeline.errors import UnknownReference
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.repair import registry_faults
from rlhf_pipeline.registry.store import Registry
from tests.faults.registry_load import concurrency

pytestmark = pytest.mark.check


def model(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))


@pytest.mark.check
def test_processes_that_register_read_and_move_aliases_at_once() -> None:
    found = concurrency(processes=4, registrations=8)
    assert found["ok"], {
        key: value for key, value in found.items() if key not in ("processes", "registered", "seconds")
    }
    assert found["versions"] == 32
    assert found["reads"] > 0 and found["flips"] > 0


def test_a_number_is_not_used_again_while_versions_are_removed(tmp_path) -> None:
    registry = Registry(tmp_path / "home")

    def publish_and_remove(_: int) -> list[int]:
        made = []
        for _ in range(6):
            item = registry.publish("demo", "sft", model, code={"package": "test"})
            made.append(item.version)
            registry.remove(item.label)
        return made

    with ThreadPoolExecutor(6) as pool:
        versions = [version for made in pool.map(publish_and_remove, range(6)) for version in made]
    assert sorted(versions) == list(range(1, 37))
    assert registry.models.gone("demo") == list(range(1, 37))


def test_the_latest_version_is_whole_or_the_one_before_while_versions_are_removed(tmp_path) -> None:
    registry = Registry(tmp_path / "home")
    registry.publish("demo", "sft", model, code={"package": "test"})
    registry.alias("demo@v1", "best")
    done = threading.Event()

    def publish_and_remove() -> None:
        try:
            for _ in range(40):
                registry.remove(registry.publish("demo", "sft", model, code={"package": "test"}).label)
        finally:
            done.set()

    thread = threading.Thread(target=publish_and_remove)
    thread.start()
    reads, seen = 0, set()
    while not done.is_set():
        seen.add(registry.resolve("demo").version == 1)
        assert registry.resolve("demo@best").version == 1
        assert registry_faults(registry) == []
        reads += 1
    thread.join()
    assert reads > 0
    assert registry.resolve("demo").version == 1


def test_an_alias_that_names_a_version_published_a_moment_ago_is_found(tmp_path, monkeypatch) -> None:
    registry = Registry(tmp_path / "home")
    registry.publish("demo", "sft", model, code={"package": "test"})
    registry.alias("demo@v1", "best")
    numbers = registry.models.numbers

    def late(name: str) -> list[int]:
        """Between the look at the aliases and that at the versions another process publishes and moves the alias."""
        monkeypatch.setattr(registry.models, "numbers", numbers)
        made = registry.publish("demo", "sft", model, code={"package": "test"})
        registry.alias(made.label, "best")
        return numbers(name)

    aliases = registry.models.aliases

    def looked(name: str) -> dict[str, int]:
        found = aliases(name)
        monkeypatch.setattr(registry.models, "aliases", aliases)
        monkeypatch.setattr(registry.models, "numbers", late)
        return found

    monkeypatch.setattr(registry.models, "aliases", looked)
    found = registry.resolve("demo@best")
    assert found.version == 1
    verify_files(found)
    assert registry.resolve("demo@best").version == 2


def test_a_name_whose_versions_are_all_removed_meanwhile_is_unknown(tmp_path, monkeypatch) -> None:
    registry = Registry(tmp_path / "home")
    registry.publish("demo", "sft", model, code={"package": "test"})
    read = registry._number

    def remove_then(reference, name):
        number = read(reference, name)
        if registry.models.numbers("demo"):
            registry.models.remove("demo", 1)
        return number

    monkeypatch.setattr(registry, "_number", remove_then)
    try:
        registry.resolve("demo")
    except UnknownReference as error:
        assert "no model 'demo'" in str(error)
    else:
        raise AssertionError("a model that is not there was found")
