"""Arms that differ in more than the way they were trained are refused, and the difference is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rlhf_pipeline.compare import aim
from rlhf_pipeline.compare.aim import aim_of
from rlhf_pipeline.compare.fairness import differences, differences_by_seed, facts_of
from rlhf_pipeline.compare.run import compared, run_compare
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.report.results import Comparable


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
    lab.run("train-rm", output_name="shrunk", center_rewards_coefficient=0.1, max_steps=20)
    lab.run("ppo", output_name="shrunk-ppo", reward_model_path="shrunk", max_steps=1)
    lab.run("train-rm", output_name="decayed", weight_decay=0.1, max_steps=1)
    lab.run("ppo", output_name="decayed-ppo", reward_model_path="decayed", weight_decay=0.1, max_steps=1)
    lab.run("dpo", output_name="decayed-dpo", weight_decay=0.1, max_steps=1)
    lab.run("dpo", output_name="ipo", loss_type="ipo", max_steps=1)
    lab.run("dpo", output_name="cpo", loss_type="cpo", max_steps=1)
    lab.run("dpo", output_name="population", dataset_name="world:verdicts", max_train_samples=2, max_steps=1)
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
        ("ppo", "shorter", {"lengths", "preference data"}),  # some pairs no longer fit
        ("penalised", "dpo", {"options that move the optimum"}),
        ("shrunk-ppo", "dpo", {"options that move the optimum"}),
        ("shrunk-ppo", "ppo", {"options that move the optimum"}),
        ("decayed-ppo", "dpo", {"options that move the optimum"}),
        ("decayed-ppo", "decayed-dpo", set()),  # decayed alike
        ("ipo", "dpo", {"options that move the optimum"}),
        ("cpo", "dpo", {"options that move the optimum", "reference"}),
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
    return compared(lab.config("compare", arms=list(models), samples=1, max_prompts=2, **changes), lab.home, quiet=True)


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
    assert result.comparable.ok is False and result.comparable.allowed is True
    (difference,) = result.comparable.differences
    assert difference.values == {"penalised@v1": "missing_eos_penalty=1.0", "dpo@v1": "none"}
    assert any(
        entry.topic == "next" and "first train the arms under the same conditions" in entry.text
        for entry in result.verdict.lines
    )
    matched = compare(arms, "ppo", "dpo", baseline="sft", name="matched")
    assert matched.comparable == Comparable(ok=True, differences=[], allowed=False)


def test_a_reward_model_with_another_minimiser_is_refused_by_the_name_of_what_moved_it(arms):
    with pytest.raises(MismatchError) as caught:
        compare(arms, "shrunk-ppo", "dpo", baseline="sft")
    expected = (
        "options that move the optimum: shrunk-ppo@v1 has reward_model.center_rewards_coefficient=0.1, dpo@v1 has"
    )
    assert expected in str(caught.value)


def without_the_field(resolved):
    """The model as an earlier release registered it."""
    return dataclasses.replace(resolved, manifest=resolved.manifest.model_copy(update={"moves_optimum": None}))


def test_models_of_an_earlier_release_are_read_by_their_configs(arms, monkeypatch):
    registry, resolve = arms.registry, type(arms.registry).resolve
    monkeypatch.setattr(type(registry), "resolve", lambda *a, **k: without_the_field(resolve(*a, **k)))
    assert found(arms, ppo="ppo", dpo="dpo") == {}
    moved = found(arms, a="shrunk-ppo", b="dpo")["options that move the optimum"]
    assert moved == {"a": "reward_model.center_rewards_coefficient=0.1", "b": "none"}
    assert set(found(arms, a="ppo", b="ipo")) == {"options that move the optimum"}


def with_slope(monkeypatch, **slope):
    """Let every reward model have this calibration slope."""
    found = aim.reward_models_of

    def models(registry, resolved):
        for model in found(registry, resolved):
            metrics = {**model.manifest.metrics, "calibration_slope": slope}
            yield dataclasses.replace(model, manifest=model.manifest.model_copy(update={"metrics": metrics}))

    monkeypatch.setattr(aim, "reward_models_of", models)


def test_a_slope_that_cannot_be_told_from_0_gives_no_effective_beta(arms, monkeypatch):
    with_slope(monkeypatch, mean=-1.6, low=-3.4, high=0.1)
    beta = aim_of(arms.registry, arms.registry.resolve("shrunk-ppo")).effective_beta
    assert (beta.mean, beta.low, beta.high, beta.slope.mean) == (None, None, None, -1.6)
    assert beta.why_not == "the calibration slope, -1.60 [-3.40, 0.10], cannot be told from 0"


@pytest.mark.check
def test_the_effective_beta_is_kl_coef_times_the_slope_of_the_reward_model(arms, monkeypatch):
    slope = {"mean": 0.8, "low": 0.5, "high": 1.1}
    with_slope(monkeypatch, **slope)
    given = {"arms": ["shrunk-ppo", "dpo"], "baseline": "sft", "name": "effective", "allow_mismatch": True}
    result = run_compare(arms.config("compare", **given, samples=1, max_prompts=2), arms.home, quiet=True)
    row = {row.name: row for row in result.rows}
    beta = row["shrunk-ppo@v1"].effective_beta
    assert [beta.mean, beta.low, beta.high] == [0.5 * slope[key] for key in ("mean", "low", "high")]
    assert beta.reward_model == "shrunk@v1" and row["dpo@v1"].effective_beta is None
    assert row["shrunk-ppo@v1"].moves_optimum == {"reward_model.center_rewards_coefficient": 0.1}
    assert row["shrunk-ppo@v1"].may_move_optimum == {"lam": 0.95}
    said = " ".join(line.text for line in result.verdict.lines)
    assert "another optimum (reward_model.center_rewards_coefficient=0.1)" in said
    assert {entry.at for entry in result.contrasts} == {"as trained, with a different optimum for shrunk-ppo@v1"}
    page = Path(result.report).read_text(encoding="utf-8")
    assert "effective β" in page and "Options that move the optimum if the critic is wrong" in page
    half = [{"source": "shrunk", "weight": 0.5}]
    light = arms.run("ppo", output_name="light", reward_model_path=None, reward_functions=half, max_steps=1)
    weighed = aim_of(arms.registry, arms.registry.resolve(light.model)).effective_beta
    assert weighed.mean == pytest.approx(0.5 * slope["mean"] / 0.5)  # half the reward: KL costs twice as much
    honest = aim_of(arms.registry, arms.registry.resolve("honest"))
    assert honest.effective_beta is None and honest.optimum == "same"


def test_a_model_without_a_manifest_says_nothing(arms):
    assert facts_of(arms.registry, arms.registry.resolve(str(arms.home / "models" / "sft" / "v1"))) in (
        {},
        facts_of(arms.registry, arms.registry.resolve("sft")),
    )


def test_a_judge_that_saw_the_arms_pairs_is_no_judge(arms):
    with pytest.raises(MismatchError, match="judge: not held out"):
        compare(arms, "ppo", "dpo", baseline="sft", judge="reward")
    arms.run("train-rm", output_name="judge", dataset_train_split="judge", max_steps=1)
    held_out = compare(arms, "ppo", "dpo", baseline="sft", judge="judge", name="judged")
    assert held_out.judge == "judge@v1" and held_out.comparable.ok
    assert {"judge@v1", "reward@v1"} <= set(held_out.gates)
    failed = [one.text for one in held_out.verdict.lines if "failed its gate" in one.text]
    assert len(failed) == sum(not gate.passed for gate in held_out.gates.values())


def test_an_arms_own_reward_model_is_not_the_truth(arms):
    with pytest.raises(MismatchError, match="true_reward: a reward that an arm is trained on: ppo@v1 has reward@v1"):
        compare(arms, "ppo", "dpo", baseline="sft", true_reward="reward")


def test_a_judge_that_saw_what_an_sft_arm_was_tuned_on_is_no_judge(arms):
    arms.run("sft", output_name="preferred", dataset_train_split="judge", max_steps=1)
    arms.run("train-rm", output_name="judge-of-sft", dataset_train_split="judge", max_steps=1)
    with pytest.raises(MismatchError, match="judge: not held out: preferred@v1"):
        compare(arms, "preferred", "dpo", baseline="sft", judge="judge-of-sft")


def test_rewards_beside_a_reward_model_are_part_of_the_preferences(arms):
    mixed = [{"source": "reward", "weight": 1.0}, {"source": "world", "weight": 1.0}]
    arms.run("ppo", output_name="mixed", reward_model_path=None, reward_functions=mixed, max_steps=1)
    assert set(found(arms, a="mixed", b="dpo")) == {"preference data"}


@pytest.mark.check
def test_other_data_can_be_a_part_of_what_is_compared(arms):
    fewer = arms.run("dpo", output_name="fewest", max_train_samples=6, max_steps=1).model
    with pytest.raises(MismatchError, match=r"(?s)preference data: .*--allow-other-data: the report"):
        compare(arms, "dpo", fewer, baseline="sft")
    result = compare(arms, "dpo", fewer, baseline="sft", allow_other_data=True)
    assert result.comparable.ok is True
    assert [difference.what for difference in result.comparable.differences] == ["preference data"]
    with pytest.raises(MismatchError, match="SFT parent"):
        compare(arms, "ppo", "other-parent", baseline="sft", allow_other_data=True)


@pytest.mark.check
def test_the_optimum_can_be_a_part_of_what_is_compared(arms):
    squared = arms.run("dpo", output_name="squared", loss_type="ipo", max_steps=1).model
    with pytest.raises(MismatchError, match=r"(?s)loss_type=ipo.* --allow-other-optimum: the report"):
        compare(arms, "dpo", squared, baseline="sft")
    with pytest.raises(MismatchError, match=r"(?s)loss_type=ipo.* --allow-other-optimum: the report"):
        compare(arms, "dpo", squared, baseline="sft", allow_other_data=True)
    result = compare(arms, "dpo", squared, baseline="sft", allow_other_optimum=True)
    assert result.comparable.ok is True
    kinds = {row.arm: row.optimum for row in result.rows}
    assert kinds[squared] == "scale" and kinds["dpo@v1"] == "same"
    fewer = arms.run("dpo", output_name="squared-few", loss_type="ipo", max_train_samples=6, max_steps=1).model
    with pytest.raises(MismatchError, match=r"--allow-other-data --allow-other-optimum: the report"):
        compare(arms, "dpo", fewer, baseline="sft")


def test_fewer_pairs_and_other_labels_are_differences(arms):
    fewer = arms.run("dpo", output_name="fewer", max_train_samples=8, max_steps=1).model
    soft = arms.run("dpo", output_name="soft", soft_labels=True, max_steps=1).model
    assert "preference data" in found(arms, ppo="ppo", dpo=fewer)
    assert set(found(arms, ppo="ppo", dpo=soft)) == {"labels"}


def test_lengths_written_in_two_ways_are_the_same(arms):
    other = arms.run("dpo", output_name="sum", response_length=None, max_length=10, max_steps=1).model
    assert found(arms, ppo="ppo", dpo=other) == {}


def test_parents_have_to_agree_seed_by_seed(arms):
    registry = arms.registry
    model = {name: registry.resolve(name) for name in ("ppo", "dpo", "other-parent")}
    arms.run("train-rm", output_name="other-reward", model_name_or_path="other-sft", max_steps=1)
    crossed = arms.run("ppo", output_name="crossed", model_name_or_path="other-sft", max_steps=1).model
    points = [
        ("ppo", 1, model["ppo"]),
        ("dpo", 1, model["other-parent"]),
        ("ppo", 2, registry.resolve(crossed)),
        ("dpo", 2, model["dpo"]),
    ]
    assert {"SFT parent", "reference"} <= {one.what for one in differences_by_seed(registry, points)}


def test_a_parent_that_is_another_model_here_is_refused(arms, tmp_path):
    from rlhf_pipeline.registry.parents import reference_of

    other = arms.copy(tmp_path / "home")
    dpo = arms.registry.resolve("dpo")
    assert reference_of(other.registry, dpo).label == "sft@v1"
    moved = dpo.manifest.model_copy(
        update={
            "parents": {
                **dpo.manifest.parents,
                "reference": dpo.manifest.parents["base"].model_copy(update={"digest": "0" * 64}),
            }
        }
    )
    with pytest.raises(MismatchError, match="reference was sft@v1 with the digest 000000000000"):
        reference_of(other.registry, dataclasses.replace(dpo, manifest=moved))
