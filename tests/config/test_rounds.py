"""`rounds` of an experiment: each arm collects from its own policy and trains again on all data so far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import expand
from rlhf_pipeline.errors import ConfigError

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft", "model_name_or_path": "org/base", "dataset_name": "world:verdicts"},
    "pairs": {"stage": "collect", "policy": "sft", "prompts": "world:verdicts", "judge": "world", "num": 60},
    "judge": {"stage": "train-rm", "model_name_or_path": "sft", "dataset_name": "pairs", "seed": 1000},
    "reward": {"stage": "train-rm", "model_name_or_path": "sft", "dataset_name": "pairs"},
    "ppo": {
        "stage": "ppo",
        "model_name_or_path": "sft",
        "reward_model_path": "reward",
        "judge": "judge",
        "dataset_name": "pairs",
        "total_episodes": 640,
    },
    "dpo": {"stage": "dpo", "model_name_or_path": "sft", "dataset_name": "pairs"},
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def run(*overrides: str, stages: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Any:
        compare = {"arms": ["ppo", "dpo"], "baseline": "sft", "judge": "judge"}
        content = {"name": "trial", "rounds": 3, "stages": {**STAGES, **(stages or {})}, "compare": compare, **changes}
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return load_experiment(path, list(overrides))

    return run


def refused(load: Callable[..., Any], *overrides: str, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **changes)
    return [str(fault) for fault in caught.value.faults]


def named(experiment: Any) -> dict[str, Any]:
    return {spec.name: spec for spec in experiment.stages}


def test_each_arm_repeats_what_lies_between_its_data_and_itself(load):
    names = [spec.name for spec in load().stages][len(STAGES) :]
    ppo = [f"{name}-{number}" for number in (2, 3) for name in ("pairs-ppo", "reward-ppo", "ppo")]
    assert names == [*ppo, "pairs-dpo-2", "dpo-2", "pairs-dpo-3", "dpo-3"]


def test_a_round_collects_from_the_policy_before_it_for_the_prompts_that_follow(load):
    stages = named(load("pairs.first_record=7"))
    second, third = stages["pairs-dpo-2"], stages["pairs-dpo-3"]
    assert (second.links[("policy",)], third.links[("policy",)]) == ("dpo", "dpo-2")
    assert [stages[name].config.first_record for name in ("pairs", "pairs-dpo-2", "pairs-dpo-3")] == [7, 67, 127]
    assert third.resolved({"dpo-2": "dpo-2@v1"}).policy == "dpo-2@v1"
    assert third.config.output_name == "pairs-dpo-3"


def test_a_round_trains_on_all_data_so_far_from_the_start_of_round_1(load):
    stages = named(load())
    outputs = {name: f"{name}@v1" for name in stages}
    dpo = stages["dpo-3"].resolved(outputs)
    assert [one.dataset_name for one in dpo.datasets] == ["pairs@v1", "pairs-dpo-2@v1", "pairs-dpo-3@v1"]
    assert [one.fraction for one in dpo.datasets] == [1, 1, 1]
    assert (dpo.dataset_name, dpo.model_name_or_path, dpo.output_name) == (None, "sft@v1", "dpo-3")
    reward = stages["reward-ppo-2"].resolved(outputs)
    assert [one.dataset_name for one in reward.datasets] == ["pairs@v1", "pairs-ppo-2@v1"]
    ppo = stages["ppo-2"].resolved(outputs)
    assert (ppo.reward_model_path, ppo.judge, ppo.model_name_or_path) == ("reward-ppo-2@v1", "judge@v1", "sft@v1")
    assert [one.dataset_name for one in ppo.datasets] == ["pairs@v1", "pairs-ppo-2@v1"]


def test_the_start_and_the_reference_stay_those_of_round_1(load):
    best = {**STAGES["pairs"], "output_name": "best"}
    raft = {"stage": "sft", "model_name_or_path": "sft", "dataset_name": "best"}
    dpo = {**STAGES["dpo"], "model_name_or_path": "raft", "ref_model": "raft"}
    order = {"best": best, "raft": raft, "late": dpo}
    stages = named(load(stages=order, round_arms=["late"]))
    assert not {"raft-late-2", "best-late-2"} & set(stages)
    links = stages["late-2"].links
    assert (links[("model_name_or_path",)], links[("ref_model",)]) == ("raft", "raft")


def test_the_last_data_alone(load):
    stages = named(load(round_data="last"))
    assert [one.dataset_name for one in stages["dpo-3"].config.datasets] == ["pairs-dpo-3"]
    assert stages["dpo-3"].links == {("model_name_or_path",): "sft", ("datasets", 0, "dataset_name"): "pairs-dpo-3"}


def test_a_mixture_keeps_its_other_sources_and_their_weights(load):
    mixed = [
        {"dataset_name": "org/other", "weight": 2.0},
        {"dataset_name": "pairs", "weight": 3.0, "max_samples": 40},
    ]
    dpo = {"stage": "dpo", "model_name_or_path": "sft", "datasets": mixed}
    spec = named(load(stages={"dpo": dpo}))["dpo-2"]
    found = [(one.dataset_name, one.weight, one.max_samples) for one in spec.config.datasets]
    assert found == [("org/other", 2, None), ("pairs", 3, 40), ("pairs-dpo-2", 3, 40)]
    links = {path: name for path, name in spec.links.items() if path[0] == "datasets"}
    assert links == {("datasets", 1, "dataset_name"): "pairs", ("datasets", 2, "dataset_name"): "pairs-dpo-2"}
    alone = named(load(stages={"dpo": dpo}, round_data="last"))["dpo-2"]
    assert [one.dataset_name for one in alone.config.datasets] == ["org/other", "pairs-dpo-2"]


def test_the_comparison_gets_every_round(load):
    experiment = load()
    assert experiment.compare.config.arms == ("ppo", "ppo-2", "ppo-3", "dpo", "dpo-2", "dpo-3")
    assert set(experiment.compare.links.values()) == {*experiment.compare.config.arms, "sft", "judge"}
    assert experiment.compare.config.allow_other_data and not load(rounds=1).compare.config.allow_other_data
    chosen = load("compare.arms=[ppo-3,dpo-3]", "compare.allow_other_data=false")
    assert not chosen.compare.config.allow_other_data
    assert chosen.compare.config.arms == ("ppo-3", "dpo-3")


def test_some_arms_only(load):
    stages = named(load(round_arms=["dpo"]))
    assert not {"ppo-2", "pairs-ppo-2"} & set(stages) and "dpo-3" in stages


def test_an_arm_on_other_data_has_no_rounds(load):
    other = {"stage": "dpo", "model_name_or_path": "sft", "dataset_name": "org/pairs"}
    experiment = load(stages={"offline": other})
    assert not {"offline-2", "pairs-offline-2"} & set(named(experiment))
    (fault,) = refused(load, stages={"offline": other}, round_arms=["offline"])
    assert "round_arms.0" in fault
    assert "offline does not depend on data that the experiment collects" in fault


def test_one_round_is_the_experiment_itself(load):
    assert [spec.name for spec in load(rounds=1).stages] == list(STAGES)


def test_every_seed_has_its_own_rounds_and_a_stage_that_sets_its_seed_keeps_it(load):
    nodes = expand(load(seeds=[0, 1], stages={"dpo": {**STAGES["dpo"], "seed": 5}}))
    second = {(node.name, node.seed): node for node in nodes}
    assert {seed for name, seed in second if name == "ppo-3"} == {0, 1}
    assert second["ppo-3", 1].spec.config.seed == 1
    assert {node.spec.config.seed for node in nodes if node.name.startswith("dpo")} == {5}
    parent = nodes[second["pairs-ppo-3", 1].inputs["ppo-2"]]
    assert (parent.name, parent.seed) == ("ppo-2", 1)


def test_what_rounds_refuse(load):
    (fault,) = refused(load, stages={"dpo-2": STAGES["sft"]})
    assert "stages.dpo-2" in fault and "round 2 of dpo has this name" in fault
    found = refused(load, sweep={"dpo.beta": [0.1, 1.0]})
    assert [one for one in found if "dpo.beta is swept, but the stage dpo is repeated in rounds" in one]
    (fault,) = refused(load, round_arms=["reward"])
    assert "'reward' is not a policy of this experiment; expected one of ppo, dpo" in fault
    given = {name: {**entry, "dataset_name": "world:verdicts"} for name, entry in STAGES.items() if name != "pairs"}
    found = refused(load, stages={**given, "dpo": {**STAGES["dpo"], "dataset_name": "org/x"}})
    assert [one for one in found if "found 3, but no ppo or dpo stage depends on data" in one]
    renamed = {**STAGES["dpo"], "column_mapping": {"prompt": "question"}}
    assert [one for one in refused(load, stages={"dpo": renamed}) if "column_mapping does not apply" in one]


def test_an_arm_with_demonstrations_has_the_rounds_of_its_policy(load):
    compare = {"arms": ["dpo", "few_shot:dpo", "icdpo:sft"], "baseline": "sft"}
    arms = load(rounds=2, compare=compare).compare.config.arms
    assert arms == ("dpo", "dpo-2", "few_shot:dpo", "few_shot:dpo-2", "icdpo:sft")
    links = load(rounds=2, compare=compare).compare.links
    assert links[("arms", 3)] == "dpo-2"
    named = {"arms": ["dpo", "few_shot:dpo-2"], "baseline": "sft"}
    assert load(rounds=2, compare=named).compare.config.arms == ("dpo", "few_shot:dpo-2")
