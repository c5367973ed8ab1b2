"""A stage whose data are in a store trains the same weights, and registers the same data, as with data in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.data import parsed


@pytest.mark.check
@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_a_stage_does_the_same_from_a_store(lab, monkeypatch, stage) -> None:
    import torch

    options = {"max_steps": 2, "output_name": "same", "dataset_name": "collected:pairs"}
    options |= {"max_steps": None, "total_episodes": 64} if stage == "ppo" else {}
    plain = lab.run(stage, **options)
    assert not (lab.home / "cache" / "tokens").exists()
    monkeypatch.setattr(parsed, "STORED_BYTES", 0)
    parsed._PARSED.clear()
    stored = lab.run(stage, **options)
    assert len(list(Path(lab.home, "cache", "tokens").glob("*/table.json"))) == 2
    first, second = (lab.registry.resolve(result.model).manifest for result in (plain, stored))
    assert first.version + 1 == second.version and first.data == second.data and first.data
    weights, others = (lab.weights(result.model) for result in (plain, stored))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    assert not {"loss", "eval_accuracy", "eval_nll", "eval_examples", "train_pairs"} & {
        key for key in plain.metrics if plain.metrics[key] != stored.metrics[key]
    }
