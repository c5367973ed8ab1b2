"""Arms with demonstrations in their context: names in configs, links of experiments, local paths."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.in_context import InContext
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.mentions import mentions, set_reference
from rlhf_pipeline.errors import ConfigError

STAGES = {
    "sft": {
        "stage": "sft",
        "dataset_name": "world:verdicts",
        "model_init": {"model_type": "llama"},
        "tokenizer_init": "world",
    },
    "pairs": {"stage": "collect", "prompts": "world:verdicts", "judge": "world", "num": 100, "policy": "sft"},
    "dpo": {"stage": "dpo", "model_name_or_path": "sft", "dataset_name": "pairs"},
}


def experiment(**compare):
    return load_experiment({"name": "demo", "seeds": [0], "stages": STAGES, "compare": compare})


def test_an_arm_of_an_experiment_names_a_stage():
    compare = experiment(arms=["few_shot:sft", "dpo"], baseline="sft", in_context={"source": "pairs"}).compare
    assert compare.links == {
        ("arms", 0): "sft",
        ("arms", 1): "dpo",
        ("baseline",): "sft",
        ("in_context", "source"): "pairs",
    }
    config = compare.resolved({"sft": "sft@v3", "dpo": "dpo@v1", "pairs": "collected:pairs@v2"})
    assert config.arms == ("few_shot:sft@v3", "dpo@v1") and config.baseline == "sft@v3"
    assert config.in_context == InContext(source="collected:pairs@v2")


def test_an_arm_of_an_unknown_model_is_named():
    with pytest.raises(ConfigError, match=r"arms\.0.*'sfr' names no stage.*did you mean 'sft'"):
        experiment(arms=["few_shot:sfr", "dpo"])


def test_mentions_are_of_the_policy():
    config = load_config("compare", None, extra={"arms": ["few_shot:a", "b"], "baseline": "few_shot:c"}).config
    assert [(found.path, found.role, found.text) for found in mentions(config)] == [
        (("arms", 0), "policy", "a"),
        (("arms", 1), "policy", "b"),
        (("baseline",), "policy", "c"),
    ]


def test_a_name_is_replaced_behind_the_method():
    values = {"arms": ("few_shot:a", "b")}
    set_reference(values, ("arms", 0), "a@v1")
    set_reference(values, ("arms", 1), "b@v1")
    assert values["arms"] == ["few_shot:a@v1", "b@v1"]


def test_a_folder_beside_the_config(write, tmp_path):
    (tmp_path / "model").mkdir()
    path = write("compare.yaml", "arms: ['few_shot:./model', sft]\n")
    assert load_config("compare", path).config.arms[0] == f"few_shot:{path.parent / 'model'}"


def test_a_model_and_the_same_with_demonstrations_are_two_arms():
    assert load_config("compare", None, extra={"arms": ["sft", "few_shot:sft"]}).config.baseline is None
    with pytest.raises(ConfigError, match="named twice"):
        load_config("compare", None, extra={"arms": ["few_shot:sft", "few_shot:sft"]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"demonstrations": 0}, r"in_context\.demonstrations"),
        ({"demonstration": 2}, r"in_context\.demonstration: there is no such key"),
        ({"prefixes": "many"}, r"in_context\.prefixes"),
    ],
)
def test_wrong_values_are_named(given, said):
    with pytest.raises(ConfigError, match=said):
        load_config("compare", None, extra={"arms": ["few_shot:sft", "sft"], "in_context": given})
