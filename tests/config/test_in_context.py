"""Arms with demonstrations in their context: names in configs, links of experiments, local paths."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.compare import EvaluateConfig, require_in_context
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


def test_every_arm_may_name_a_stage_behind_a_method():
    compare = experiment(arms=["dpo", "few_shot:dpo", "icdpo:sft"]).compare
    assert compare.links == {("arms", 0): "dpo", ("arms", 1): "dpo", ("arms", 2): "sft"}
    with pytest.raises(ConfigError, match=r"arms\.1.*'sfr' names no stage"):
        experiment(arms=["dpo", "few_shot:sfr"])


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


BOTH = ["few_shot:sft", "dpo"]
REFUSED = [
    ({"split": "validation"}, BOTH, "in_context.validation_split", "has the prompts on which few_shot:sft chooses"),
    ({"split": "all"}, BOTH, "in_context.validation_split", "split 'all' has the prompts"),
    ({"in_context": {"validation_split": "test"}}, BOTH, "in_context.validation_split", "split 'test' has the prompts"),
    ({"in_context": {}}, ["sft", "dpo"], "in_context", "no arm has demonstrations in its context: found sft and dpo"),
    (
        {"in_context": {"retrieval": "embeddings"}},
        BOTH,
        "in_context.retrieval",
        "found 'embeddings' without an arm icdpo",
    ),
    ({"top_k": 5}, BOTH, "top_k", "found 5 with the arm few_shot:sft"),
    ({"do_sample": False, "num_beams": 2}, ["dpo", "icdpo:sft"], "do_sample", "found false with the arm icdpo:sft"),
    ({"do_sample": False, "num_beams": 2}, ["dpo", "icdpo:sft"], "num_beams", "found 2 with the arm icdpo:sft"),
]
VALIDATION = {"validation_split": None}


@pytest.mark.parametrize(("given", "arms", "where", "said"), REFUSED)
def test_what_does_not_go_with_an_arm_is_a_fault_of_the_config(given, arms, where, said):
    with pytest.raises(ConfigError) as caught:
        load_config("compare", None, extra={"arms": arms, **VALIDATION, **given})
    assert [one for one in caught.value.faults if one.where.endswith(f": {where}") and said in one.found]
    with pytest.raises(ConfigError) as caught:
        experiment(arms=arms, **VALIDATION, **given)
    assert [one for one in caught.value.faults if one.where.endswith(where) and said in one.found]


@pytest.mark.parametrize(("given", "arms", "where", "said"), REFUSED[:6])
def test_a_model_that_is_evaluated_is_checked_alike(given, arms, where, said):
    config = load_config("evaluate", None, extra=given).of(EvaluateConfig)
    with pytest.raises(ConfigError) as caught:
        require_in_context(config, arms[0])
    (fault,) = caught.value.faults
    assert fault.where == where and said.split(" and dpo")[0] in fault.found
    require_in_context(load_config("evaluate", None).of(EvaluateConfig), arms[0])


def test_all_that_does_not_go_together_is_said_at_once():
    given = {"arms": BOTH, "top_k": 5, "min_p": 0.1, "split": "validation", **VALIDATION}
    with pytest.raises(ConfigError) as caught:
        load_config("compare", None, extra=given)
    assert [one.where.split(": ")[-1] for one in caught.value.faults] == [
        *("min_p", "top_k", "in_context.validation_split"),
    ]
    load_config("compare", None, extra={"arms": BOTH, "temperature": 0.7})


def test_the_baseline_counts_too():
    with pytest.raises(ConfigError, match="top_k: found 5 with the arm few_shot:sft"):
        load_config("compare", None, extra={"arms": ["dpo"], "baseline": "few_shot:sft", "top_k": 5})
