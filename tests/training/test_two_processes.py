"""Two processes (DDP over gloo) take the same steps as one, in every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.once import once
from tests.two_processes import in_two_processes, run_of, run_stages

pytestmark = [pytest.mark.slow, pytest.mark.check]

SETTINGS = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 1.0, "num_train_epochs": 2, "max_steps": None}
# 9 pairs in windows of 4: the last window of an epoch has one, fewer than there are processes.
SHARES = {stage: {**SETTINGS, "max_train_samples": 9} for stage in ("sft", "train-rm", "dpo")}
SHARES["kto"] = {**SHARES["dpo"], "loss_type": "kto"}
COMMANDS = {"kto": "dpo"}
PPO = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 1.0, "max_steps": 3, "critic_warmup_steps": 1}

WORKER = """
import json, os, signal, sys
from pathlib import Path
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import Interrupted
from rlhf_pipeline.experiment.run import stage_function
from rlhf_pipeline.training import session

home, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
fit = session.fit

def stopping(at):
    def wrapped(*args, on_update, **options):
        def hook(step, metrics, window):
            if step == at and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            on_update(step, metrics, window)
        return fit(*args, on_update=hook, **options)
    return wrapped

for stage, values, resume, stop_at in runs:
    session.fit = stopping(stop_at)
    try:
        stage_function(stage)(load_config(stage, None, extra=values).config, home, quiet=True, resume=resume)
    except Interrupted:
        assert stop_at
    else:
        assert not stop_at
"""


def run_both(lab, configs) -> None:
    """Run (stage, config, resume, step at which the second process gets a signal or 0) one after another."""
    run_stages(lab, 2, WORKER, configs)


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """A home with each stage trained by one process and by two."""

    def make(folder: Path) -> tuple:
        lab = tiny.copy(folder / "home")
        one, two = {}, []
        for stage, changes in SHARES.items():
            whole = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
            half = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
            command = COMMANDS.get(stage, stage)
            one[stage] = lab.run(command, output_name=f"one-{stage}", **changes, **whole)
            two.append((command, lab.config(command, output_name=f"two-{stage}", **changes, **half), True, 0))
        # PPO's processes draw other samples than one process would, so only its mechanics can be compared.
        two.append(("ppo", lab.config("ppo", output_name="two-ppo", per_device_train_batch_size=2, **PPO), True, 0))
        two.append(("sft", lab.config("sft", output_name="again", max_steps=1), False, 0))
        two.append(("sft", lab.config("sft", output_name="again", max_steps=1), False, 0))
        for stop_at in (3, 0):  # stopped and resumed
            stopped = lab.config("dpo", output_name="stopped", snapshot_steps=[2, 6], **SHARES["dpo"], **half)
            two.append(("dpo", stopped, True, stop_at))
        run_both(lab, two)
        return lab, one

    return once(tmp_path_factory, "both", make)


@pytest.mark.check
@pytest.mark.parametrize("stage", list(SHARES))
def test_the_same_weights(both, stage):
    lab, one = both
    expected, found, start = lab.weights(one[stage].model), lab.weights(f"two-{stage}"), lab.weights("sft")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    assert max(float((start[name] - expected[name]).abs().max()) for name in start if name in expected) > 1e-3


@pytest.mark.parametrize("stage", list(SHARES))
def test_the_same_metrics_each_written_once(both, stage):
    lab, one = both
    expected, found = lab.rows(one[stage].run), lab.rows(run_of(lab, f"two-{stage}"))
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 7))
    for mine, theirs in zip(found, expected, strict=True):
        if stage == "dpo" and theirs["step"] == 1:  # policy and reference agree: the margins' signs are rounding
            assert abs(mine["rewards/margins"]) < 1e-5
            mine, theirs = ({**row, "rewards/accuracies": None} for row in (mine, theirs))
        assert mine == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_one_version_and_one_run(both, stage):
    lab, _ = both
    assert lab.registry.models.numbers(f"two-{stage}") == [1]
    assert json.loads((run_of(lab, f"two-{stage}") / "run.json").read_text())["model"] == f"two-{stage}@v1"


@pytest.mark.parametrize("stage", list(SHARES))
def test_the_bill_is_that_of_both(both, stage):
    """A little above that of one process: packing differs, and a rank without an example computes a stand-in."""
    lab, one = both
    found, expected = lab.registry.resolve(f"two-{stage}").manifest.cost, one[stage].cost
    assert found["optimizer_steps"] == expected["optimizer_steps"]
    for name in ("flops", "tokens_trained"):
        assert expected[name] <= found[name] <= 1.2 * expected[name]


def test_two_runs_without_resuming_are_two_versions_in_two_directories(both):
    lab, _ = both
    assert lab.registry.models.numbers("again") == [1, 2]
    first, second = sorted(path.name for path in (lab.home / "runs").glob("again-*"))
    assert second == f"{first}-2"
    assert torch.equal(lab.weights("again@v1")["lm_head.weight"], lab.weights("again@v2")["lm_head.weight"])


def test_a_signal_to_one_process_stops_both_and_the_run_resumes_bit_equal(both):
    lab, _ = both
    expected, found = lab.weights("two-dpo"), lab.weights("stopped")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    whole, resumed = run_of(lab, "two-dpo"), run_of(lab, "stopped")
    assert lab.rows(resumed) == lab.rows(whole)
    assert "resumed at step 3" in (resumed / "log.txt").read_text()
    costs = [lab.registry.resolve(name).manifest.cost for name in ("two-dpo", "stopped")]
    for name in ("flops", "tokens_trained", "optimizer_steps"):
        assert costs[0][name] == costs[1][name]
        assert 0 < costs[1]["at_step"]["2"][name] < costs[1]["at_step"]["6"][name] == costs[1][name]  # of both ranks


def test_ppo(both):
    lab, _ = both
    rows = lab.rows(run_of(lab, "two-ppo"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["episodes"] for row in rows] == [16, 32, 48]
    assert rows[0]["objective/kl"] == 0
    assert max(row["first_minibatch/ratio_error"] for row in rows) <= 1e-5
    assert max(row["first_minibatch/clipfrac"] for row in rows) == 0
    assert lab.registry.resolve("two-ppo").manifest.cost["optimizer_steps"] == 3 * 2 * 2
    cost = lab.registry.resolve("two-ppo").manifest.cost
    # Two epochs, prompts of 6 tokens, which the responses of a micro-batch to one prompt share.
    prompts = cost["tokens_trained"] - 2 * cost["tokens_generated"]
    assert prompts % 6 == 0 and 2 * 3 <= prompts / 6 <= 2 * 16 * 3


def test_both_decide_by_the_evaluation_of_the_first():
    """The second process finds another figure, as another GPU might in the last bits."""
    program = """
import os, sys
from types import SimpleNamespace
from accelerate import Accelerator
from rlhf_pipeline.training.session import log_update

found = []
nothing = lambda *_: []
monitor = SimpleNamespace(update=nothing, lasting=dict)
log = SimpleNamespace(update=nothing, record=nothing)
config = SimpleNamespace(eval_strategy="steps", eval_steps=2)
run = SimpleNamespace(accelerator=Accelerator(cpu=True), log=log, config=config)
plan = SimpleNamespace(total=4, evaluate=lambda: {"eval/loss": 1.0 + int(os.environ["RANK"])})
figures = [log_update(run, plan, monitor, step, {}, 0.0) for step in (1, 2)]
assert figures == [{}, {"eval/loss": 1.0}], figures
"""
    codes, outputs = in_two_processes(program)
    assert codes == [0, 0], "\n".join(outputs)
