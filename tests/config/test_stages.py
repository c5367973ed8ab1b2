from __future__ import annotations

import pydantic
import pytest

from rlhf_pipeline.config.base import moves_optimum, part_of
from rlhf_pipeline.config.lengths import Lengths, resolve_lengths
from rlhf_pipeline.config.mentions import mentions
from rlhf_pipeline.config.plan import COMMANDS
from rlhf_pipeline.config.stages import SCHEMAS, STAGES
from rlhf_pipeline.errors import ConfigError


@pytest.mark.parametrize("stage", SCHEMAS)
def test_every_field_is_described_and_every_required_one_has_an_example(stage):
    schema = SCHEMAS[stage]
    assert schema.stage == stage
    for name, field in schema.model_fields.items():
        assert field.description and "\n" not in field.description, name
        assert field.examples or not field.is_required(), name


@pytest.mark.parametrize("stage", SCHEMAS)
def test_configs_are_frozen_and_refuse_unknown_keys(load, stage, valid):
    config = load(stage)
    with pytest.raises(pydantic.ValidationError):
        config.seed = 3
    with pytest.raises(pydantic.ValidationError):
        SCHEMAS[stage](**valid[stage], bogus=1)


def test_the_commands_of_an_experiment_are_the_stages():
    assert tuple(STAGES) == COMMANDS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (1023, 1023, 1024)),
        ((100, None, None), (100, 924, 1024)),
        ((None, 48, None), (976, 48, 1024)),
        ((None, None, 31), (30, 30, 31)),
        ((10, 20, None), (10, 20, 30)),
        ((10, None, 31), (10, 21, 31)),
        ((None, 20, 31), (11, 20, 31)),
        ((11, 20, 31), (11, 20, 31)),
        ((None, None, 2), (1, 1, 2)),
    ],
)
def test_given_two_lengths_the_third_follows(given, expected):
    assert resolve_lengths(*given) == Lengths(*expected)


def test_a_total_alone_is_halved_where_responses_are_sampled(load):
    assert resolve_lengths(None, None, 31, samples=True) == Lengths(16, 15, 31)
    assert resolve_lengths(None, None, None, samples=True) == Lengths(512, 512, 1024)
    assert resolve_lengths(10, None, 31, samples=True) == resolve_lengths(10, None, 31)
    for stage, expected in (("sft", (30, 30, 31)), ("ppo", (16, 15, 31)), ("collect", (16, 15, 31))):
        config = load(stage, max_length=31)
        assert config.lengths() == Lengths(*expected)
        assert config.sampled_lengths() == Lengths(16, 15, 31)
        (said,) = [line for remark in config.remarks for line in remark(config) if "alone" in line] or [None]
        assert (said is None) == (stage == "sft")
        assert said is None or "sampled up to 15 tokens and prompts cut to 16" in said
    config = load("ppo", max_length=31, response_length=5)
    assert not [line for remark in config.remarks for line in remark(config) if "alone" in line]


@pytest.mark.parametrize("given", [(11, 20, 30), (None, None, 1), (1024, None, None), (None, 31, 31), (40, None, 31)])
def test_lengths_that_contradict_each_other(given):
    with pytest.raises(ConfigError):
        resolve_lengths(*given)


def test_lengths_of_a_config(load):
    assert load("dpo", max_prompt_length=7, response_length=3).lengths() == Lengths(7, 3, 10)
    assert load("collect", response_length=24, max_length=31).lengths() == Lengths(7, 24, 31)


def test_what_follows_in_ppo(load):
    config = load("ppo", rollout_batch_size=128, num_mini_batches=4, per_device_train_batch_size=16)
    assert (config.minibatch_size, config.gradient_accumulation_steps, config.updates) == (32, 2, 5)
    assert config.value_init == "reward_model"
    assert [(term.source, term.weight) for term in config.rewards] == [("reward", 1.0)]
    config = load("ppo", reward_model_path=None, reward_functions=["world", {"source": "m:f", "weight": 0.5}])
    assert config.value_init == "sft"
    assert [(term.source, term.weight) for term in config.rewards] == [("world", 1.0), ("m:f", 0.5)]
    assert load("ppo", max_steps=3, total_episodes=None).updates == 3
    assert load("ppo", stop_token="eos").stop_token is None


def test_eval_steps_imply_the_strategy_and_default_to_logging_steps(load):
    assert load("sft", eval_steps=5).eval_strategy == "steps"
    assert load("sft", eval_strategy="steps", logging_steps=7).eval_steps == 7
    assert load("sft").eval_steps is None


@pytest.mark.parametrize("tokenizer", ["world", "world:verdicts", {"type": "world"}])
def test_the_world_tokenizer_by_all_its_names(load, tokenizer):
    config = load("sft", model_name_or_path=None, model_init={"model_type": "llama"}, tokenizer_init=tokenizer)
    assert config.tokenizer_init == {"type": "world"}


@pytest.mark.parametrize("value", [5, [2, 4], [4, 2, 2]])
def test_snapshots_every_n_steps_or_at_steps(load, value):
    assert load("sft", snapshot_steps=value).snapshot_steps == (5 if value == 5 else (2, 4))


@pytest.mark.parametrize(("value", "expected"), [("1,4,16", (1, 4, 16)), (4, (4,)), ([1, 2], (1, 2)), ([], ())])
def test_best_of_as_a_list_or_as_text(load, value, expected):
    assert load("evaluate", best_of=value).best_of == expected


def test_all_that_moves_the_optimum_is_listed(load):
    changes = {"temperature": 0.7, "gamma": 0.99, "whiten_rewards": True, "missing_eos_penalty": 1}
    assert moves_optimum(load("ppo", **changes)) == changes
    weighted = load("ppo", reward_model_path=None, reward_functions=[{"source": "world", "weight": 2}])
    assert moves_optimum(weighted) == {"reward_functions": [{"source": "world", "weight": 2.0}]}
    assert moves_optimum(load("dpo", beta=0.7, soft_labels=True)) == {}


def test_models_and_data_that_a_config_names(load):
    config = load(
        "ppo",
        dataset_name=None,
        datasets=[{"dataset_name": "org/a"}, {"dataset_name": "world:verdicts"}],
        reward_model_path=None,
        reward_functions=["world", "rm@v2", "module:function"],
    )
    assert [(found.path, found.role, found.text) for found in mentions(config)] == [
        (("model_name_or_path",), "policy", "sft"),
        (("datasets", 0, "dataset_name"), "data", "org/a"),
        (("reward_functions", 1, "source"), "reward", "rm@v2"),
    ]


def test_prompts_are_the_part_of_a_world_where_prompts_are_asked_for():
    assert part_of("world:verdicts", None, "prompt") == "prompts"
    assert part_of("world:verdicts", None, "row") is None
    assert part_of("world:verdicts", "demonstrations", "prompt") == "demonstrations"
    assert part_of("rows.jsonl", None, "prompt") is None
