"""Two runs with one seed are bit-identical; another seed is another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

STAGES = ("sft", "train-rm", "dpo", "ppo")


@pytest.mark.parametrize("stage", STAGES)
def test_one_seed_gives_one_model(lab, stage):
    first, second = (lab.run(stage, output_name=name) for name in ("first", "second"))
    other = lab.run(stage, output_name="other", seed=1)
    ours, again, theirs = (lab.weights(result.model) for result in (first, second, other))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    assert (Path(first.run) / "metrics.jsonl").read_text() == (Path(second.run) / "metrics.jsonl").read_text()
    assert first.metrics == second.metrics


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_manifest_says(lab, stage):
    result = lab.run(stage)
    resolved = lab.registry.resolve(result.model)
    manifest = resolved.manifest
    assert manifest.stage == {"train-rm": "reward"}.get(stage, stage)
    assert manifest.parents["base"].digest == lab.registry.resolve("sft").digest
    roles = {"sft": {"base"}, "train-rm": {"base"}, "dpo": {"base", "reference"}}
    assert set(manifest.parents) == roles.get(stage, {"base", "reference", "reward_model"})
    assert [entry.source for entry in manifest.data] == ["collected:pairs@v1"]
    assert manifest.seed == 0
    assert manifest.tokenizer_digest == lab.registry.resolve("sft").manifest.tokenizer_digest
    assert manifest.cost["optimizer_steps"] == (4 * 2 * 2 if stage == "ppo" else 4)
    assert result.as_dict()["model"] == f"{resolved.name}@v1"
    assert Path(result.path) == resolved.path


@pytest.mark.parametrize("stage", STAGES)
def test_snapshots_can_be_used_wherever_a_reference_is(lab, stage):
    result = lab.run(stage, snapshot_steps=[1, 3])
    reference = f"{result.model}#1"
    early, late = (lab.weights(f"{result.model}#{step}") for step in (1, 3))
    assert any(not torch.equal(early[name], late[name]) for name in early)
    assert (lab.registry.resolve(result.model).path / "snapshots" / "step-3" / "tokenizer.json").is_file()
    if stage == "train-rm":
        used = lab.run("ppo", reward_model_path=reference, max_steps=1)
        assert lab.registry.resolve(used.model).manifest.parents["reward_model"].ref == reference
    else:
        used = lab.run("dpo", output_name="further", model_name_or_path=reference, max_steps=1)
        parent = lab.registry.resolve(used.model).manifest.parents["base"]
        assert (parent.ref, parent.digest) == (reference, lab.registry.resolve(reference).digest)


def test_the_models_trunk_is_left_alone_by_training(lab):
    """Training writes a new version and changes no file of its parent."""
    before = lab.registry.resolve("sft").digest
    for stage in STAGES:
        lab.run(stage, max_steps=1)
    from rlhf_pipeline.registry.integrity import verify_files

    resolved = lab.registry.resolve("sft")
    verify_files(resolved)
    assert resolved.digest == before
