"""`engine: trl` trains the same adapters as the native loop."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.check

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj", "up_proj"]}


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo"])
def test_the_adapters_agree(lab, stage):
    """One window of equal micro-batches for each step, so the losses are the same function."""
    changes = {**LORA, "dataset_train_split": "all", "per_device_train_batch_size": 8, "max_steps": 4}
    native = lab.run(stage, output_name="native", **changes)
    theirs = lab.run(stage, output_name="theirs", engine="trl", **changes)
    ours, found = lab.weights(native.model), lab.weights(theirs.model)
    assert ours.keys() == found.keys() and any("lora_B" in name and value.any() for name, value in ours.items())
    for name in ours:
        torch.testing.assert_close(found[name], ours[name], atol=2e-4, rtol=1e-3)
    manifest = lab.registry.resolve(theirs.model).manifest
    assert manifest.adapter["r"] == 4 and manifest.parents["base"].ref == "sft@v1"
