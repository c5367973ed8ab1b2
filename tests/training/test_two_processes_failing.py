"""Two processes (DDP over gloo) of which one runs out of memory, or meets a number that is not finite."""

from __future__ import annotations

import json

import pytest

from tests.two_processes import in_two_processes

pytestmark = [pytest.mark.slow, pytest.mark.check]

SETTINGS = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 1.0, "max_steps": 3, "save_steps": 1}
PPO = {**SETTINGS, "per_device_train_batch_size": 4}

# The second process alone has a fault: "memory" (more than half a micro-batch does not fit), "full" (nothing fits), or
# in update 2 a "loss", "gradient" or "reward" of NaN.
WORKER = """
import json, os, sys
from pathlib import Path
import torch
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.experiment.run import stage_function
from rlhf_pipeline.models import modules
from rlhf_pipeline.rollout import rewards
from rlhf_pipeline.stages import dpo

home, stage, values, fault = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
if os.environ["RANK"] == "1":
    most = {"memory": 4 if stage == "dpo" else 2, "full": 0}.get(fault)
    for kind in (modules.Policy, modules.ActorCritic) if most is not None else ():
        def limited(module, batch=None, _forward=kind.forward, **decode):
            if torch.is_grad_enabled() and module.training and batch.num_completions > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return _forward(module, batch, **decode)
        kind.forward = limited
    calls = []
    if fault in ("loss", "gradient"):
        loss = dpo.preference_loss
        def spoiled(*given, **options):
            from dataclasses import replace
            calls.append(1)
            found = loss(*given, **options)
            if len(calls) < 2:
                return found
            bad = found.loss + float("nan") if fault == "loss" else (found.loss - found.loss.detach()).abs().sqrt()
            return replace(found, loss=bad)
        dpo.preference_loss = spoiled
    if fault == "reward":
        score = rewards.ModelReward.score
        def spoiled(self, examples, packed=None):
            calls.append(1)
            found = score(self, examples, packed)
            return found if len(calls) <= 2 else found * float("nan")
        rewards.ModelReward.score = spoiled
try:
    stage_function(stage)(load_config(stage, None, extra=values).config, home, quiet=True)
except RunFailed as error:
    print("RunFailed:", error)
    sys.exit(1)
"""


def in_two(lab, config, stage: str, fault: str) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of both processes."""
    return in_two_processes(WORKER, str(lab.home), stage, json.dumps(config.model_dump(mode="json")), fault)


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_one_that_runs_out_of_memory_repeats_its_share(lab, stage):
    changes = PPO if stage == "ppo" else {**SETTINGS, "per_device_train_batch_size": 4}
    for fault in ("none", "memory"):
        codes, outputs = in_two(lab, lab.config(stage, output_name=f"{stage}-{fault}", **changes), stage, fault)
        assert codes == [0, 0], "\n".join(outputs)
    expected, found = lab.weights(f"{stage}-none"), lab.weights(f"{stage}-memory")
    assert all((found[name] - expected[name]).abs().max() <= 1e-6 for name in expected)
    start = lab.weights("sft")
    assert max((found[name] - start[name]).abs().max() for name in start) > 1e-3
    (state,) = (lab.home / "runs").glob(f"{stage}-memory-*/checkpoints/step-2/state.json")
    assert json.loads(state.read_text())["extra"]["halvings"]["training"] == 1  # of all processes from then on


@pytest.mark.parametrize(
    ("stage", "fault", "figure"),
    [("dpo", "loss", "loss is"), ("dpo", "gradient", "gradient is"), ("ppo", "reward", "rewards of reward@v1 are")],
)
def test_one_that_is_not_finite_stops_both(lab, stage, fault, figure):
    """Both leave with exit 1; the one that knows the rows tells them, after the batch is written."""
    changes = PPO if stage == "ppo" else {**SETTINGS, "per_device_train_batch_size": 4}
    codes, outputs = in_two(lab, lab.config(stage, output_name="stopped", **changes), stage, fault)
    assert codes == [1, 1], "\n".join(outputs)
    assert f"RunFailed: update 2: the {figure} not finite" in outputs[1]
    assert "RunFailed: process 1 of this run has failed" in outputs[0]
    (run,) = (lab.home / "runs").iterdir()
    assert sorted(path.name for path in (run / "failure").iterdir()) == ["batch.safetensors", "failure.json"]
    assert json.loads((run / "failure" / "failure.json").read_text())["rows"]
    assert (run / "checkpoints" / "step-1").is_dir() and not (run / "checkpoints" / "step-2").exists()
    assert not lab.registry.models.numbers("stopped")


def test_one_that_is_full_stops_both(lab):
    codes, outputs = in_two(lab, lab.config("dpo", output_name="stopped", **SETTINGS), "dpo", "full")
    assert codes == [1, 1], "\n".join(outputs)
    assert "out of memory in training" in outputs[1]
    assert "RunFailed: process 1 of this run has failed" in outputs[0]
