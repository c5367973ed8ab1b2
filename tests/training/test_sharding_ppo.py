"""PPO with weights divided between processes (FSDP2 over gloo): the first update of one, and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.once import once
from tests.training.test_sharding import LORA, SECOND, told
from tests.training.test_two_processes_resume import PPO
from tests.training.test_two_processes_resume import WORKER as GIVEN
from tests.two_processes import run_of, run_stages, same

pytestmark = [pytest.mark.slow, pytest.mark.check]

COUNTED = """
import json
from rlhf_pipeline.models.sharding import local
from rlhf_pipeline.training.open_run import Run

placed = Run.placed

def counted(self, *models):
    placed(self, *models)
    if self.sharded:
        held = [[sum(local(one).numel() for one in model.parameters()),
                 sum(one.numel() for one in model.parameters())] for model in models]
        print("MODELS" + json.dumps([self.config.output_name, held]))

Run.placed = counted
"""
SAMPLED = COUNTED + GIVEN.replace("ppo_rollouts._sample = given\n", "")
GIVEN = COUNTED + GIVEN
RUNS = {
    "critic": {},
    "from-sft": {"value_init": "sft"},
    "shared": {"value_init": "shared"},
    "lora": {**LORA, "value_init": "sft"},
    "lora-reward": LORA,
    "zero2": {**SECOND, "num_ppo_epochs": 2},
    "zero2-warm-up": {**SECOND, "critic_warmup_steps": 1, "max_steps": 2, "value_init": "sft"},
    "warm-up": {"critic_warmup_steps": 1, "max_steps": 2, "weight_decay": 0.1},
}


def ppo(lab, name: str, count: int, changes: dict, stop_at: int = 0, *, begun: int = 0, fsdp: bool = True) -> tuple:
    size = 16 // (begun or count)
    values = {**PPO, "max_steps": 1, "per_device_train_batch_size": size, "output_name": name, "fsdp": fsdp, **changes}
    return "ppo", lab.config("ppo", **values), stop_at


@pytest.fixture(scope="module")
def divided(tiny, tmp_path_factory):
    """A home with runs of one process and of two that divide the weights, given the same rollouts."""

    def make(folder: Path) -> tuple:
        lab = tiny.copy(folder / "home")
        run_stages(lab, 1, GIVEN, [ppo(lab, f"{name}-1", 1, changes) for name, changes in RUNS.items()])
        two = [ppo(lab, f"{name}-2", 2, changes) for name, changes in RUNS.items()]
        return lab, run_stages(lab, 2, GIVEN, two)

    return once(tmp_path_factory, "divided", make)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_take_the_first_update_of_one_given_its_rollouts(divided, name):
    lab, outputs = divided
    same(lab, f"{name}-2", f"{name}-1", within=2e-5)
    models = [dict(told(output, "MODELS"))[f"{name}-2"] for output in outputs]
    assert len(models[0]) == len(models[1]) == 3  # actor and critic, the reference, the reward model
    for (mine, total), (theirs, _) in zip(*models, strict=True):
        assert mine + theirs == total and 0.4 < mine / total < 0.6


@pytest.mark.parametrize("zero", [{}, SECOND], ids=["zero3", "zero2"])
def test_their_samples_are_those_of_whole_weights(tiny, tmp_path, zero):
    """Each process ends its responses by itself; then two processes resume bit for bit."""
    lab = tiny.copy(tmp_path / "home")
    three = {"max_steps": 3, **zero}
    first = [ppo(lab, "whole", 2, three, fsdp=False), ppo(lab, "parts", 2, three), ppo(lab, "cut", 2, three, 2)]
    run_stages(lab, 2, SAMPLED, first)
    run_stages(lab, 2, SAMPLED, [ppo(lab, "cut", 2, three)])
    same(lab, "parts", "whole", within=2e-5)
    assert lab.rows(run_of(lab, "cut")) == lab.rows(run_of(lab, "parts"))


@pytest.mark.parametrize("then", [1, 4])
def test_another_number_of_processes_resumes_their_checkpoint(tiny, tmp_path, then):
    lab = tiny.copy(tmp_path / "home")
    three = {"max_steps": 3}
    run_stages(lab, 2, GIVEN, [ppo(lab, "all", 2, three), ppo(lab, "cut", 2, three, 2)])
    run_stages(lab, then, GIVEN, [ppo(lab, "cut", then, three, begun=2)])
    same(lab, "cut", "all", within=2e-5)
