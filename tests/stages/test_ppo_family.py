"""A2C, RLOO and GRPO as runs: what they train and leave out, what they cost, and that they resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.experiment.weights import training_memory
from rlhf_pipeline.models.modules import ActorCritic
from tests.conftest import DEFAULTS, stopped_before

pytestmark = pytest.mark.check

FAMILY = {
    "a2c": {"algorithm": "a2c", "num_ppo_epochs": 1, "num_mini_batches": 1},
    "rloo": {"algorithm": "rloo"},
    "grpo": {"algorithm": "grpo", "num_generations": 4},
    "published": {
        "algorithm": "grpo",
        "num_generations": 4,
        "kl_in": "loss",
        "scale_rewards": "group",
        "loss_normalization": "responses",
    },
}


@pytest.mark.parametrize("name", FAMILY)
def test_a_run_by_its_command(lab, capsys, tmp_path, name):
    values = {**DEFAULTS["ppo"], **FAMILY[name], "output_name": name, "max_steps": 3, "logging_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    words = ["--home", str(lab.home), "ppo", "--config", str(tmp_path / "config.yaml"), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["stage"], result["model"]) == ("ppo", f"{name}@v1")
    manifest = lab.registry.resolve(name).manifest
    assert (manifest.stage, manifest.config["algorithm"]) == ("ppo", FAMILY[name]["algorithm"])
    assert set(manifest.moves_optimum) == (
        {"kl_in", "num_generations", "scale_rewards", "loss_normalization"} if name == "published" else set()
    )
    card = (Path(result["path"]) / "README.md").read_text()
    assert f"A policy trained by {FAMILY[name]['algorithm'].upper()} against a reward." in card
    rows = lab.rows(result["run"])
    assert rows[0]["objective/kl"] == 0 < rows[-1]["objective/kl_k3"]
    assert max(row["first_minibatch/ratio_error"] for row in rows) <= 1e-5
    critic = {"loss/value_avg", "val/clipfrac_avg", "val/explained_variance"}
    assert critic & set(rows[0]) == (critic if name == "a2c" else set())
    assert ("loss/kl_avg" in rows[0]) == (name == "published")
    steps = 3 if name == "a2c" else 3 * 2 * 2
    assert result["cost"]["optimizer_steps"] == steps


@pytest.mark.parametrize("name", FAMILY)
def test_a_killed_run_resumes_bit_for_bit(lab, name):
    changes = {**FAMILY[name], "max_steps": 3, "save_steps": 1}
    whole = lab.run("ppo", output_name="whole", **changes)
    with stopped_before(3):
        lab.run("ppo", **changes)
    resumed = lab.run("ppo", **changes)
    expected, found = lab.weights(whole.model), lab.weights(resumed.model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert lab.rows(resumed.run) == lab.rows(whole.run)


def test_no_critic_is_loaded_trained_counted_or_saved(lab, monkeypatch):
    """The bill is that of PPO without the critic's passes; the module that checkpoints hold is the actor alone."""
    made = []
    build = ActorCritic.__init__
    monkeypatch.setattr(
        ActorCritic, "__init__", lambda self, *args, **options: (made.append(self), build(self, *args, **options))[1]
    )
    groups = {"num_generations": 4, "max_steps": 1, "save_steps": 1}
    ppo = lab.run("ppo", output_name="with", value_init="shared", **groups)
    rloo = lab.run("ppo", output_name="without", algorithm="rloo", **groups)
    with_head, without = ({name for name, _ in module.named_parameters()} for module in made)
    assert without == {name for name in with_head if name.startswith("actor.")}
    assert rloo.cost["flops"] == ppo.cost["flops"]  # a value head on the actor is not counted
    own = lab.run("ppo", output_name="own", value_init="sft", **groups)
    assert own.cost["flops"] > 1.3 * rloo.cost["flops"]
    assert "no critic: the baseline" in (Path(rloo.run) / "log.txt").read_text()


def test_the_estimate_counts_no_critic(lab):
    rloo, own = (lab.config("ppo", algorithm=name) for name in ("rloo", "ppo"))
    assert estimate_stage(rloo, lab.home)["updates"] == estimate_stage(own, lab.home)["updates"]
    # Weights, gradients and two moments of the actor; reference and reward model, all in fp32.
    assert training_memory(100, None, rloo) == 100 * 4 * (4 + 2)
    assert training_memory(100, None, own) == 100 * 4 * (2 * 4 + 2)


def test_an_entropy_bonus_keeps_a_run_more_uncertain(lab):
    plain, bonus = (
        lab.rows(lab.run("ppo", output_name=f"with-{c:g}", entropy_coef=c, max_steps=4).run) for c in (0.0, 5.0)
    )
    assert "loss/entropy_avg" not in plain[0]
    for row in bonus:
        assert row["loss/entropy_avg"] == pytest.approx(-row["policy/entropy_avg"], rel=1e-5)
    assert bonus[-1]["policy/entropy_avg"] > plain[-1]["policy/entropy_avg"] + 0.01
