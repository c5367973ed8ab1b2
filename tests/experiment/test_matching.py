"""Arms that differ in more than the way they were trained are refused, and the difference is named."""

from __future__ import annotations

import pytest

from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.experiment.compare import run_compare
from rlhf_pipeline.experiment.matching import differences, facts_of


@pytest.fixture(scope="module")
def arms(tiny, tmp_path_factory):
    """One PPO and one DPO model that match, and some that do not."""
    lab = tiny.copy(tmp_path_factory.mktemp("arms") / "home")
    lab.run("ppo", max_steps=1)
    lab.run("dpo", max_steps=1)
    lab.run("sft", output_name="other-sft", max_steps=1, dataset_name="world:verdicts", max_train_samples=64)
    lab.run("dpo", output_name="other-parent", model_name_or_path="other-sft", max_steps=1)
    lab.run("dpo", output_name="shorter", response_length=3, max_steps=1)
    lab.run("ppo", output_name="penalised", missing_eos_penalty=1.0, max_steps=1)
    lab.run("ppo", output_name="warm", temperature=0.7, max_steps=1)
    lab.run(
        "ppo",
        output_name="honest",
        reward_model_path=None,
        max_steps=1,
        reward_functions=[{"source": "world", "weight": 1.0}],
    )
    lab.run("dpo", output_name="population", dataset_name="world:verdicts", max_steps=1)
    return lab


def found(lab, **named):
    registry = lab.registry
    rows = differences(registry, {arm: [registry.resolve(text)] for arm, text in named.items()})
    return {row.what: dict(row.values) for row in rows}


def test_ppo_and_dpo_of_one_experiment_match(arms):
    assert found(arms, ppo="ppo", dpo="dpo") == {}
    assert found(arms, sft="sft", dpo="dpo") == {}  # an SFT model has no preference data to differ in


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("ppo", "other-parent", {"SFT parent", "reference"}),
        ("ppo", "shorter", {"lengths"}),
        ("penalised", "dpo", {"options that move the optimum"}),
        ("warm", "dpo", {"options that move the optimum", "training temperature"}),
        ("honest", "dpo", {"preference data"}),
        ("ppo", "population", {"preference data", "prompts"}),
    ],
)
def test_each_difference_is_found(arms, one, other, what):
    assert set(found(arms, a=one, b=other)) == what


def test_the_same_parent_under_another_name_is_the_same(arms):
    arms.registry.alias("sft", "start")
    renamed = arms.run("dpo", output_name="renamed", model_name_or_path="sft@start", max_steps=1)
    assert found(arms, ppo="ppo", dpo=renamed.model) == {}


def compare(lab, *models, **changes):
    return run_compare(
        lab.config("compare", arms=list(models), samples=1, max_prompts=2, **changes), lab.home, quiet=True
    )


def test_compare_refuses_and_names_the_difference(arms):
    with pytest.raises(MismatchError) as caught:
        compare(arms, "ppo", "other-parent", baseline="sft")
    text = str(caught.value)
    assert "SFT parent: ppo@v1 has sft@v1" in text and "other-parent@v1 has other-sft@v1" in text
    assert "--allow-mismatch" in text
    with pytest.raises(MismatchError, match=r"response 4.*response 3"):
        compare(arms, "ppo", "shorter", baseline="sft")


def test_a_mismatch_that_is_allowed_is_reported(arms):
    result = compare(arms, "penalised", "dpo", baseline="sft", allow_mismatch=True)
    assert result["comparable"]["ok"] is False and result["comparable"]["allowed"] is True
    (difference,) = result["comparable"]["differences"]
    assert difference["values"] == {"penalised@v1": "missing_eos_penalty=1.0", "dpo@v1": "none"}
    assert any(
        entry["topic"] == "next" and "train the arms alike" in entry["text"] for entry in result["verdict"]["lines"]
    )
    matched = compare(arms, "ppo", "dpo", baseline="sft", name="matched")
    assert matched["comparable"] == {"ok": True, "differences": [], "allowed": False}


def test_a_model_without_a_manifest_says_nothing(arms):
    assert facts_of(arms.registry, arms.registry.resolve(str(arms.home / "models" / "sft" / "v1"))) in (
        {},
        facts_of(arms.registry, arms.registry.resolve("sft")),
    )
