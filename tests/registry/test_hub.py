"""Upload to the hub, against a local stand-in of huggingface_hub's calls; and the metadata of the card."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.disk.sealed import unseal
from rlhf_pipeline.registry.hub import push
from rlhf_pipeline.registry.manifest import Parent
from rlhf_pipeline.registry.store import Registry


class Hub:
    """What a repository holds after an upload."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        if self.error is not None:
            raise self.error
        assert exist_ok
        self.repositories.setdefault(repo_id, {"private": private})
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        files = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in folder_path.rglob("*")}
        self.repositories[repo_id] |= {"files": files, "message": commit_message}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


def test_a_model_is_uploaded_with_card_and_manifest(tiny, hub, capsys) -> None:
    assert main(["--home", str(tiny.home), "models", "push", "reward@v1", "org/scores", "--private", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    stored = hub.repositories["org/scores"]
    assert stored["private"] and stored["message"] == "Upload reward@v1"
    assert told["files"] == sorted(stored["files"]) and told["url"] == "https://huggingface.co/org/scores"
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "manifest.json"} <= set(stored["files"])
    path = tiny.registry.resolve("reward").path
    assert stored["files"]["model.safetensors"] == (path / "model.safetensors").read_bytes()
    assert json.loads(stored["files"]["manifest.json"])["name"] == "reward"
    assert main(["--home", str(tiny.home), "models", "push", "sft", "org/sft"]) == 0
    assert hub.repositories["org/sft"]["private"] is None  # the hub's default, and an existing one stays as it is
    assert "uploaded sft@v1 to https://huggingface.co/org/sft" in capsys.readouterr().out


def test_no_local_path_is_uploaded(tmp_path, hub, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    registry, start, data = Registry(tmp_path), "/home/jane/models/start_1", "/srv/jane/my-pairs.jsonl"

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": start, "r": 4}))

    registry.publish(
        "dpo",
        "dpo",
        write,
        parents={"base": Parent(ref=start, digest="ab" * 32), "reference": Parent(ref="org/name")},
        config={
            "model_name_or_path": start,
            "datasets": [{"dataset_name": data}, {"dataset_name": "more/of-jane.csv"}, {"dataset_name": "org/set"}],
            "chat_template": "</s>\n~/x",
            "output_dir": "~/out/",
        },
        data=[{"source": data, "digest": "cd" * 32, "rows": 3}],
        metrics={f"score of {start}": 1.0, "health": []},
        run="dpo-1/x",
        adapter={"type": "LoRA", "note": "logs are in /home/jane/logs"},
    )
    push(registry, "dpo", "org/dpo")
    files = hub.repositories["org/dpo"]["files"]
    assert not [name for name, content in files.items() if b"jane/" in content or b"more/" in content]
    told = unseal(files["manifest.json"].decode())
    assert told["parents"] == {
        "base": {"ref": "start_1", "digest": "ab" * 32},
        "reference": {"ref": "org/name", "digest": None},
    }
    assert [(entry["source"], entry["digest"]) for entry in told["data"]] == [("my-pairs.jsonl", "cd" * 32)]
    assert told["config"] == {
        "model_name_or_path": "start_1",
        "datasets": [{"dataset_name": name} for name in ("my-pairs.jsonl", "of-jane.csv", "org/set")],
        "chat_template": "</s>\n~/x",
        "output_dir": "out",
    }
    assert told["metrics"] == {"score of start_1": 1.0, "health": []} and told["run"] == "dpo-1/x"
    assert told["adapter"]["note"] == "logs are in ~/logs"
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "start_1", "r": 4}
    card = files["README.md"].decode()
    assert "| base | start\\_1 | abababababab |" in card and '"dataset_name": "my-pairs.jsonl"' in card
    assert {name: entry["sha256"] for name, entry in told["files"].items()} == {
        name: sha256(content).hexdigest() for name, content in files.items() if name != "manifest.json"
    }


@pytest.mark.parametrize("name", ["name", "a/b/c", "../x", "org/-x", "org/a--b", "org/na me"])
def test_a_name_that_the_hub_cannot_have(tiny, hub, capsys, name) -> None:
    assert main(["--home", str(tiny.home), "models", "push", "sft", name]) == 2
    assert "org/name" in capsys.readouterr().err and not hub.repositories


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalTokenNotFoundError("no"), "set HF_TOKEN, or run hf auth login"),
        (OSError("cannot reach huggingface.co\nmore"), "did not take sft@v1: cannot reach huggingface.co; check"),
    ],
)
def test_a_refusal_of_the_hub(tiny, hub, capsys, error, said) -> None:
    hub.error = error
    assert main(["--home", str(tiny.home), "models", "push", "sft", "org/sft"]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_is_not_pushed(tiny, hub, tmp_path, capsys) -> None:
    copy = tiny.registry.export("sft", tmp_path / "copy")
    assert main(["--home", str(tiny.home), "models", "push", str(copy), "org/sft"]) == 2
    assert "is not in the registry" in capsys.readouterr().err


def head(path: Path) -> dict[str, Any]:
    return yaml.safe_load((path / "README.md").read_text().split("---\n")[1])


def test_the_licence_of_a_model_is_that_of_its_start(lab, tmp_path) -> None:
    start = lab.registry.export("sft", tmp_path / "start")
    (start / "manifest.json").unlink()
    (start / "README.md").write_text("---\nlicense: 'apache-2.0'\nlanguage: en\n---\n# Start\nlicense: mit\n")
    first = lab.run("sft", model_name_or_path=str(start), max_steps=1, output_name="first")
    assert head(Path(first.path))["license"] == "apache-2.0"
    second = lab.run("dpo", model_name_or_path="first", max_steps=1)
    found = head(Path(second.path))
    assert found == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "dpo"],
    }
    assert "license" not in head(lab.registry.resolve("sft").path)
    assert main(["--home", str(lab.home), "models", "verify"]) == 0
