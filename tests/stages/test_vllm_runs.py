"""Whole runs of PPO with vLLM itself (`make vllm`): adapters, resuming, an experiment, and what is refused before."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.errors import ConfigError
from tests.conftest import CPU, LENGTHS, Lab, stopped_before
from tests.stages.test_vllm_itself import SIZES

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]

LLAMA = {"model_type": "llama", **SIZES, "tie_word_embeddings": True}

PPO = {
    **LENGTHS,
    **CPU,
    "model_name_or_path": "sft",
    "dataset_name": "world:verdicts",
    "max_train_samples": 200,
    "reward_functions": [{"source": "world"}],
    "output_name": "ppo",
    "learning_rate": 5e-3,
    "kl_coef": 0.5,
    "rollout_batch_size": 16,
    "per_device_train_batch_size": 8,
    "num_ppo_epochs": 4,
    "num_mini_batches": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "rollout_engine": "vllm",
    "vllm_gpu_memory_utilization": 0.12,
}
SFT = {
    **LENGTHS,
    **CPU,
    "output_name": "sft",
    "model_init": LLAMA,
    "tokenizer_init": {"type": "world"},
    "dataset_name": "world:verdicts",
    "max_train_samples": 500,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 32,
    "max_steps": 20,
}


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Lab:
    from rlhf_pipeline.api import sft

    home = tmp_path_factory.mktemp("vllm") / "home"
    sft(SFT, home=home, quiet=True)
    return Lab(home)


def trained(home: Path, **changes):
    from rlhf_pipeline.api import ppo

    return ppo({**PPO, **changes}, home=home, quiet=True)


def off(lab: Lab, result) -> float:
    return max(row["sampler/logprob_difference"] for row in lab.rows(result["run"]))


def test_ppo_trains_with_whole_weights_and_with_adapters(started):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "learning_rate": 3e-2}
    whole = trained(started.home)
    adapter = trained(started.home, output_name="adapter", **lora)
    again = trained(started.home, output_name="again", model_name_or_path="adapter", max_steps=2, **lora)
    for result in (whole, adapter, again):
        assert off(started, result) <= 1e-5
        assert started.rows(result["run"])[-1]["objective/kl"] > 1e-3


def test_a_resumed_run_is_that_of_one_go(started, tmp_path):
    """On one machine with one version the tokens depend on the seeds alone."""
    other, settings = started.copy(tmp_path / "other"), {"save_steps": 2, "output_name": "resumed"}
    whole = trained(started.home, **settings)
    with stopped_before(3):
        trained(other.home, **settings)
    resumed = trained(other.home, **settings)
    ours, theirs = started.weights(whole["model"]), other.weights(resumed["model"])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_experiment_by_the_command_line(tmp_path):
    """Two seeds of PPO with vLLM in one process, other stages and the comparison after them."""

    def part(values: dict) -> dict:
        return {key: value for key, value in values.items() if key != "output_name"}

    stages = {
        "sft": {"stage": "sft", **part(SFT)},
        "ppo": {"stage": "ppo", **part(PPO)},
        "native": {"stage": "ppo", **part(PPO), "rollout_engine": "native"},
    }
    compare = {"arms": ["ppo", "native"], "baseline": "sft", "judge": "world", "max_prompts": 20, "exact": False, **CPU}
    experiment = {"name": "both", "seeds": [0, 1], "stages": stages, "compare": compare}
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))
    words = ["run", str(tmp_path / "experiment.yaml"), "--home", str(tmp_path / "home"), "--json"]
    command = [sys.executable, "-m", "rlhf_pipeline.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    points = json.loads(done.stdout)["points"]
    assert [point["model"] for point in points if point["stage_name"] == "ppo"] == ["ppo@v1", "ppo@v2"]
    logs = [path.read_text() for path in (tmp_path / "home/runs").glob("*/log.txt")]
    assert sum("rollouts by vllm" in log for log in logs) == 2


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ({"model_type": "mixtral", "num_local_experts": 2}, {}, "mixture of experts"),
        ({"head_dim": 16}, {}, "attention heads of width 16, and vllm computes on a CPU only 32, 64"),
        ({}, {"temperature": 2.5}, "found 2.5, which vllm refuses"),
        ({}, {"temperature": 0.005}, "found 0.005, which vllm would raise to 0.01"),
    ],
)
def test_what_it_cannot_do_is_refused_before_it_starts(tmp_path, monkeypatch, model, changes, said):
    from rlhf_pipeline.api import sft

    monkeypatch.setattr(
        "rlhf_pipeline.rollout.vllm_engine.VllmEngine.__init__", lambda *_, **__: pytest.fail("started")
    )
    sft({**SFT, "model_init": {**LLAMA, **model}, "max_steps": 1}, home=tmp_path, quiet=True)
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path, **changes)
