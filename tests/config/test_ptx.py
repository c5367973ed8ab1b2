"""The keys of PPO's pretraining stream."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.base import DataInput
from rlhf_pipeline.config.dump import dump_yaml
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.mentions import mentions
from rlhf_pipeline.config.yaml import parse_value

ONE = {"ptx_coef": 0.5, "ptx_dataset": "org/text"}


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"ptx_coef": 0.5}, "ptx_dataset", "missing, but ptx_coef is 0.5"),
        ({"ptx_coef": -1}, "ptx_coef", "found -1"),
        ({"ptx_dataset": "org/text"}, "ptx_dataset", "found without ptx_coef"),
        ({"ptx_batch_size": 4}, "ptx_batch_size", "found without ptx_coef"),
        ({"ptx_max_length": 4}, "ptx_max_length", "found without ptx_coef"),
        ({**ONE, "ptx_batch_size": 0}, "ptx_batch_size", "found 0"),
        ({**ONE, "ptx_dataset": "world:other"}, "ptx_dataset.0.dataset_name", "found 'world:other'"),
        ({**ONE, "ptx_dataset": []}, "ptx_dataset", "found []"),
        ({**ONE, "ptx_dataset": [{"dataset_name": "a/b", "name": "c"}]}, "ptx_dataset.0.name", "there is no such key"),
    ],
)
def test_what_is_refused(faults, changes, key, found):
    refused = faults("ppo", **changes)
    assert [place.rpartition(": ")[2] for place in refused] == [key]
    assert next(iter(refused.values())).found.startswith(found)


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo"])
def test_other_stages_have_no_stream(faults, stage):
    assert faults(stage, ptx_coef=0.5)["ptx_coef"].found == f"{stage} has no such key"


def test_a_stream_is_read_as_sft_reads_it(load):
    lengths = {"max_prompt_length": 10, "response_length": 6}
    config = load("ppo", **ONE, **lengths, dataset_config="prompts", column_mapping={"prompt": "question"})
    found = config.stream()
    assert (found.stage, found.train_on, found.completion_only_loss) == ("sft", "all_assistant", True)
    assert config.streams() == found.sources() == [DataInput("org/text", None)]
    assert vars(found.lengths()) == {"prompt": 15, "response": 15, "total": 16}
    assert load("ppo", **ONE, **lengths, ptx_max_length=100).stream().lengths().total == 100
    mixture = [{"dataset_name": "a/b", "weight": 2.0}, {"dataset_name": "c/d", "split": "all", "dataset_config": "x"}]
    both = load("ppo", ptx_coef=1, ptx_dataset=mixture)
    assert both.streams() == [DataInput("a/b", None), DataInput("c/d", "x", "all")]
    assert [found.text for found in mentions(both) if found.role == "data"] == ["org/data", "a/b", "c/d"]


def test_a_weight_of_0_reads_nothing(load):
    """So a sweep of ptx_coef may have 0 in it."""
    config = load("ppo", ptx_coef=0, ptx_dataset="org/text")
    assert config.stream() is None and config.streams() == []


def test_the_batch_is_a_minibatch_unless_it_is_given(load):
    assert load("ppo", **ONE).stream_batch_size == load("ppo").minibatch_size == 16
    assert load("ppo", **ONE, ptx_batch_size=5).stream_batch_size == 5


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "rloo", "grpo"])
def test_every_algorithm_has_it_and_it_is_read_back(load, algorithm):
    config = load("ppo", algorithm=algorithm, **ONE)
    assert load_config("ppo", parse_value(dump_yaml(config))).config == config
