"""Losses without a reference: none is loaded, computed, cached or paid for, and no beta is compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.compare.aim import aim_of
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.evaluation.preference_metrics import pair_differences, preference_metrics
from rlhf_pipeline.registry.parents import beta_of, reference_of
from rlhf_pipeline.stages import dpo
from rlhf_pipeline.stages.common import load_policy, tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.training.windows import epoch_order
from tests.conftest import DEFAULTS

FREE = [{"loss_type": "simpo", "simpo_gamma": 0.2}, {"loss_type": "orpo"}, {"loss_type": "cpo", "cpo_alpha": 0.5}]


def by_hand(lab, changes) -> dict[str, float]:
    """What the first step must log, from the policy at its start and the formulas of the papers."""
    config = lab.config("dpo", **changes)
    tokenizer = tokenizer_of(lab.registry.resolve("sft"))
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "train", tokenizer)
    window = [examples[i] for i in epoch_order(len(examples), 0, 0)[:8]]
    policy = load_policy(lab.registry.resolve("sft"), config, tokenizer, torch.device("cpu"))
    batch = pack(window)
    logprobs = batch.per_completion(policy(batch).logprobs).view(-1, 2)
    lengths = batch.lengths.view(-1, 2)
    means = logprobs / lengths
    name = config.loss_type
    if name == "cpo":
        rewards = config.beta * logprobs
        losses = torch.log1p(torch.exp(rewards[:, 1] - rewards[:, 0]))
    elif name == "simpo":
        rewards = config.beta * means
        losses = torch.log1p(torch.exp(rewards[:, 1] - rewards[:, 0] + 0.2))
    else:
        rewards = means - torch.log(1 - torch.exp(means))
        losses = config.beta * torch.log1p(torch.exp(rewards[:, 1] - rewards[:, 0]))
    weight = {"cpo": 0.5, "simpo": 0.0, "orpo": 1.0}[name]
    sft = -logprobs[:, 0].sum() / lengths[:, 0].sum()
    (losses.mean() + weight * sft).backward()
    norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in policy.parameters()))
    found = {
        "loss/dpo": losses.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
    }
    found |= {"grad_norm": norm, "logps/chosen": logprobs[:, 0].mean()} | ({"loss/sft": sft} if weight else {})
    return {key: float(torch.as_tensor(value).detach()) for key, value in found.items()}


@pytest.mark.parametrize("changes", FREE, ids=lambda changes: changes["loss_type"])
def test_the_first_step_is_that_of_the_formula_and_there_is_no_reference(lab, changes, monkeypatch):
    monkeypatch.setattr(dpo, "load_policy_and_reference", None)
    result = lab.run("dpo", max_grad_norm=0, dataset_test_split="train", **changes)
    first = lab.rows(result.run)[0]
    for name, value in by_hand(lab, {"max_grad_norm": 0, **changes}).items():
        assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert ("loss/sft" in first) == (changes["loss_type"] != "simpo")
    assert "logps/chosen_minus_reference" not in first
    assert "reference" not in result.cost["seconds"] and not list(lab.home.glob("cache/reference-*"))
    log = (Path(result.run) / "log.txt").read_text()
    assert "reference log-probabilities" not in log and f"loss_type={changes['loss_type']}" in log
    model = lab.registry.resolve(result.model)
    assert set(model.manifest.parents) == {"base"}
    assert beta_of(model) is None and aim_of(lab.registry, model).optimum == "other"
    assert reference_of(lab.registry, model).label == "sft@v1"  # what its KL is measured to
    assert 0 <= result.metrics["eval_accuracy"] <= 1


@pytest.mark.check
def test_the_reference_is_not_on_the_bill(lab):
    bills = {name: lab.run("dpo", output_name=name, loss_type=name).cost["flops"] for name in ("sigmoid", "simpo")}
    assert bills["simpo"] < bills["sigmoid"]
    online = lab.run("dpo", output_name="cpo", loss_type="cpo", precompute_ref_log_probs=False).cost["flops"]
    assert online == bills["simpo"]


def test_held_out_rewards_are_those_of_the_loss(lab):
    """As good as no step: the figures on the held-out pairs are those of the start's log-odds, by hand."""
    result = lab.run("dpo", loss_type="orpo", max_steps=1, learning_rate=1e-12, dataset_test_split="train")
    config = lab.config("dpo")
    tokenizer = tokenizer_of(lab.registry.resolve("sft"))
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "train", tokenizer)
    policy = load_policy(lab.registry.resolve("sft"), config, tokenizer, torch.device("cpu"))
    batch = pack(examples)
    with torch.no_grad():
        means = batch.per_completion(policy(batch).logprobs) / batch.lengths
    odds = (means - torch.log(1 - torch.exp(means))).view(-1, 2)
    expected = preference_metrics(*pair_differences(odds.tolist(), examples))
    for name in ("nll", "accuracy", "brier"):
        assert result.metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.check
def test_by_the_command_line_and_in_a_comparison(lab, tmp_path, capsys):
    from rlhf_pipeline.cli.main import main

    def call(*words: str) -> dict:
        assert main([*words, "--home", str(lab.home), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    path = tmp_path / "dpo.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in DEFAULTS["dpo"].items()))
    trained = call("dpo", "--config", str(path), "loss_type=simpo", "beta=2", "simpo_gamma=1", "output_name=simpo")
    assert trained["model"] == "simpo@v1"
    lab.run("dpo")
    cpu = ("use_cpu=true", "num_threads=1", "samples=2", "max_prompts=2")
    result = call("compare", "simpo", "dpo", "--allow-mismatch", "exact=false", *cpu)
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["simpo@v1"]["beta"] is None and rows["simpo@v1"]["optimum"] == "other"
    assert rows["dpo@v1"]["beta"] == 0.5 and rows["dpo@v1"]["optimum"] == "same"
    assert result["reference"] == "sft@v1" and rows["simpo@v1"]["metrics"]["kl"]
    assert not any(contrast["kind"] == "same beta" for contrast in result["contrasts"])


@pytest.mark.check
def test_an_adapter_alone(lab):
    result = lab.run("dpo", loss_type="cpo", use_peft=True, lora_r=2)
    assert lab.registry.resolve(result.model).manifest.adapter["r"] == 2


@pytest.mark.check
def test_a_dry_run_counts_no_reference(lab):
    from rlhf_pipeline.experiment.estimate import estimate_stage

    with_one, without = (estimate_stage(lab.config("dpo", loss_type=name), lab.home) for name in ("sigmoid", "simpo"))
    width = 4 * with_one["parameters"] / 2**20
    saved = with_one["memory_mib_without_activations"] - without["memory_mib_without_activations"]
    assert saved == pytest.approx(width, abs=0.06)
    assert without["estimate"]["tflop"] < with_one["estimate"]["tflop"]
