"""PPO with a pretraining stream as a run: its data, its bill, its batches, and that it resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.data.world.vocabulary import ADJECTIVES
from rlhf_pipeline.experiment.done import find_done
from rlhf_pipeline.experiment.estimate import estimate_stage
from tests.conftest import stopped_before

pytestmark = pytest.mark.check

PTX = {"ptx_coef": 0.5, "ptx_dataset": "world:verdicts"}
SLOW = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 0, "max_steps": 2}


def test_a_run_says_what_it_read_and_is_done_once(lab):
    result = lab.run("ppo", **PTX, max_steps=2)
    manifest = lab.registry.resolve(result.model).manifest
    assert manifest.moves_optimum == {"ptx_coef": 0.5}
    prompts, stream = manifest.data
    assert (prompts.source, prompts.is_stream) == ("collected:pairs@v1", False)
    assert (stream.source, stream.split, stream.is_stream) == ("world:verdicts", "train", True)
    assert manifest.metrics["stream_examples"] == stream.model_extra["kept"]
    rows = lab.rows(result.run)
    assert all(row["loss/ptx_avg"] > 0 for row in rows)
    log = (Path(result.run) / "log.txt").read_text()
    assert (
        f"pretraining stream: {stream.model_extra['kept']} examples, 8 in each optimizer step, with weight 0.5" in log
    )
    assert find_done(lab.config("ppo", **PTX, max_steps=2), lab.registry).label == result.model
    assert find_done(lab.config("ppo", **{**PTX, "ptx_coef": 0.6}, max_steps=2), lab.registry) is None
    told = estimate_stage(lab.config("ppo", **PTX), lab.home)
    assert told["stream_examples"] == stream.model_extra["kept"]
    assert any("world:verdicts" in line for line in told["data"])


def test_a_stream_that_changed_is_another_input(lab, tmp_path):
    source = tmp_path / "texts.jsonl"
    texts = [f"the music of this comedy was {word}" for word in ADJECTIVES[:3]]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changes = {"ptx_coef": 0.5, "ptx_dataset": [{"dataset_name": str(source), "split": "all"}], "max_steps": 2}
    lab.run("ppo", **changes)
    assert find_done(lab.config("ppo", **changes), lab.registry) is not None
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]))
    assert find_done(lab.config("ppo", **changes), lab.registry) is None


def test_a_killed_run_resumes_bit_for_bit(lab):
    changes = {**PTX, "max_steps": 3, "save_steps": 1, "ptx_batch_size": 5}
    whole = lab.run("ppo", output_name="whole", **changes)
    with stopped_before(3):
        lab.run("ppo", **changes)
    resumed = lab.run("ppo", **changes)
    expected, found = lab.weights(whole.model), lab.weights(resumed.model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert lab.rows(resumed.run) == lab.rows(whole.run)
    assert resumed.cost["tokens_trained"] == whole.cost["tokens_trained"]


def test_cutting_a_batch_changes_no_weight(lab):
    runs = [
        lab.run("ppo", output_name=f"cut-{size}", per_device_train_batch_size=size, **PTX, **SLOW) for size in (8, 2)
    ]
    expected, found = (lab.weights(run.model) for run in runs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    plain = lab.weights(lab.run("ppo", output_name="plain", **SLOW).model)
    assert max(float((plain[name] - expected[name]).abs().max()) for name in plain) > 1e-3


def test_the_stream_holds_the_policy_to_its_data(lab):
    """With a large weight the likelihood of the demonstrations rises above that of the SFT model."""
    result = lab.run("ppo", ptx_coef=20.0, ptx_dataset="world:verdicts", ptx_batch_size=64, max_steps=6)
    rows = lab.rows(result.run)
    assert rows[-1]["loss/ptx_avg"] < rows[0]["loss/ptx_avg"] - 0.01
