from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict

from rich.console import Console

from rlhf_pipeline.registry.lineage import lineage_of, render
from rlhf_pipeline.registry.manifest import DataEntry, Parent


def demo(registry, model):
    """Publish a demo's chain: sft -> pairs -> reward, and ppo from sft, reward and pairs."""
    sft = registry.publish(
        "sft",
        "sft",
        model("s"),
        parents={"init": Parent(ref="org/base@main")},
        data=[DataEntry(source="world:verdicts", split="train", digest="w", rows=10)],
    )
    registry.publish_data("pairs", [{"prompt": "x"}], parents={"policy": sft})
    pairs = DataEntry(source="collected:pairs@v1", split="train", digest="p", rows=8)
    reward = registry.publish("reward", "reward", model("r"), parents={"policy": sft}, data=[pairs])
    registry.publish("ppo", "ppo", model("p"), parents={"policy": sft, "reward_model": reward}, data=[pairs])
    return sft


def shape(node):
    """Return a lineage as nested tuples of role, reference and status."""
    return (node.role, node.ref, node.status, [shape(origin) for origin in node.origins])


def test_tree_of_roles_down_to_the_data(registry, model):
    demo(registry, model)
    sft = [("init", "org/base@main", "outside", []), ("data", "world:verdicts", "outside", [])]
    pairs = ("data", "collected:pairs@v1", "present", [("policy", "sft@v1", "present", sft)])
    reward = [("policy", "sft@v1", "present", sft), pairs]
    expected = [("policy", "sft@v1", "present", sft), ("reward_model", "reward@v1", "present", reward), pairs]
    tree = lineage_of(registry, registry.resolve("ppo"))
    assert shape(tree) == ("model", "ppo@v1", "present", expected)
    assert json.loads(json.dumps(asdict(tree)))["origins"][2]["digest"] == "p"


def test_removed_and_changed_parents_are_marked(registry, model, tmp_path):
    demo(registry, model)
    model("folder")(tmp_path)
    folder = registry.resolve(tmp_path)
    registry.publish("dpo", "dpo", model("d"), parents={"policy": registry.resolve("sft"), "reference": folder})
    registry.remove("sft", force=True)
    (tmp_path / "model.safetensors").write_text("other")
    shutil.rmtree(registry.home / "data")
    origins = lineage_of(registry, registry.resolve("dpo")).origins
    assert [(item.role, item.status) for item in origins] == [("policy", "missing"), ("reference", "changed")]
    data = lineage_of(registry, registry.resolve("reward")).origins[1]
    assert (data.ref, data.status) == ("collected:pairs@v1", "missing")


def test_damaged_parent_is_marked(registry, model):
    sft = demo(registry, model)
    (sft.path / "manifest.json").write_text("{")
    assert [item.status for item in lineage_of(registry, registry.resolve("ppo")).origins] == [
        "damaged",
        "present",
        "present",
    ]


def test_folder_that_names_itself_ends(registry, model, tmp_path):
    registry.publish("sft", "sft", model())
    target = registry.export("sft", tmp_path / "out")
    manifest = json.loads((target / "manifest.json").read_text())
    del manifest["format"], manifest["manifest_sha256"]
    manifest["parents"] = {"policy": {"ref": str(target), "digest": None}}
    (target / "manifest.json").write_text(json.dumps(manifest))
    tree = lineage_of(registry, registry.resolve(str(target)))
    assert [item.origins for item in tree.origins] == [[]]


def test_rendering_shows_references_as_they_are(registry, model):
    registry.publish("sft", "sft", model(), data=[DataEntry(source="[red]x.jsonl", digest="d" * 64, rows=3)])
    console = Console(file=io.StringIO(), width=120)
    console.print(render(lineage_of(registry, registry.resolve("sft"))))
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("model: sft@v1  sft  ")
    assert lines[1].strip() == "└── data: [red]x.jsonl  3 rows  dddddddddddd"
