"""The algorithms of `rlhf ppo`: what each sets, and options that belong to another one."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.dump import dump_yaml
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.yaml import parse_value

CRITIC = {"value_init", "vf_coef", "gamma", "lam", "whiten_rewards", "critic_warmup_steps"}
UNUSED = {
    "ppo": {"kl_in", "scale_rewards"},
    "a2c": {"kl_in", "scale_rewards", "cliprange", "cliprange_value"},
    "rloo": {"scale_rewards", "cliprange_value", *CRITIC},
    "grpo": {"cliprange_value", *CRITIC},
}
GIVEN = {
    "value_init": "sft",
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
    "critic_warmup_steps": 0,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "kl_in": "reward",
    "scale_rewards": "none",
}
"""An option of some algorithms, with its default: it is refused too, as it says what the run does not do."""


@pytest.mark.parametrize("algorithm", UNUSED)
def test_an_option_that_the_algorithm_does_not_use_is_null(load, algorithm):
    values = load("ppo", algorithm=algorithm).model_dump()
    assert {name for name in GIVEN if values[name] is None} == UNUSED[algorithm]
    used = {name: value for name, value in GIVEN.items() if name not in UNUSED[algorithm]}
    assert {name: values[name] for name in used} == {
        **used,
        **({"value_init": "reward_model"} if "lam" in used else {}),
    }


@pytest.mark.parametrize("algorithm", UNUSED)
def test_such_an_option_is_refused_by_name_even_with_its_default(faults, load, algorithm):
    for name, value in GIVEN.items():
        if name in UNUSED[algorithm]:
            refused = faults("ppo", algorithm=algorithm, **{name: value})
            assert list(refused) == [name]
            assert f"with algorithm {algorithm}, which does not use it" in refused[name].found
            assert refused[name].fix.startswith("remove it, or set algorithm: ")
        else:
            load("ppo", algorithm=algorithm, **{name: value})


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("ppo", (1, 4, 4, True)), ("a2c", (1, 1, 1, True)), ("rloo", (2, 4, 4, False)), ("grpo", (8, 4, 4, False))],
)
def test_defaults_that_follow_from_the_algorithm(load, algorithm, expected):
    config = load("ppo", algorithm=algorithm)
    names = ("num_generations", "num_ppo_epochs", "num_mini_batches", "whiten_advantages")
    assert tuple(getattr(config, name) for name in names) == expected
    assert config.has_critic == (algorithm in ("ppo", "a2c"))
    given = load("ppo", algorithm=algorithm, num_generations=4, whiten_advantages=True)
    assert (given.num_generations, given.whiten_advantages) == (4, True)


@pytest.mark.parametrize("algorithm", UNUSED)
def test_a_written_config_is_read_back_as_it_was(load, algorithm):
    config = load("ppo", algorithm=algorithm, learning_rate=1e-4)
    assert load_config("ppo", parse_value(dump_yaml(config))).config == config


def test_a_value_of_null_is_the_default(load):
    assert load("ppo").vf_coef == 0.1
    assert load_config("ppo", load("ppo").model_dump() | {"vf_coef": None, "lam": None}).config == load("ppo")


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"algorithm": "rloo", "num_generations": 1}, "num_generations", "found 1 with algorithm rloo"),
        ({"algorithm": "grpo", "num_generations": 1}, "num_generations", "found 1 with algorithm grpo"),
        ({"algorithm": "grpo", "num_generations": 7}, "num_generations", "rollout_batch_size 64 is not a multiple"),
        ({"algorithm": "a2c", "num_ppo_epochs": 2}, "num_ppo_epochs", "found 2 with algorithm a2c"),
        ({"algorithm": "a2c", "num_mini_batches": 4}, "num_mini_batches", "found 4 with algorithm a2c"),
        ({"loss_normalization": "responses"}, "loss_normalization", "found 'responses' with algorithm ppo"),
        (
            {"algorithm": "grpo", "kl_in": "loss", "whiten_advantages": True},
            "whiten_advantages",
            "found true with kl_in: loss",
        ),
        ({"algorithm": "reinforce"}, "algorithm", "found 'reinforce'"),
        ({"algorithm": "rloo", "kl_in": "loss"}, "kl_in", "found 'loss' with algorithm rloo"),
        ({"algorithm": "grpo", "kl_in": "response_loss"}, "kl_in", "found 'response_loss' with algorithm grpo"),
        (
            {"algorithm": "rloo", "kl_in": "response_loss", "whiten_advantages": True},
            "whiten_advantages",
            "found true with kl_in: response_loss",
        ),
        ({"kl_horizon": 100}, "kl_horizon", "found 100 without kl_target"),
        ({"kl_target": 6, "kl_horizon": 63}, "kl_horizon", "found 63"),
        ({"kl_target": 6, "kl_coef": 0}, "kl_coef", "found 0 with kl_target"),
        ({"kl_target": 0}, "kl_target", "found 0"),
        ({"algorithm": "grpo", "kl_in": "loss", "kl_target": 6}, "kl_target", "found 6 with kl_in: loss"),
    ],
)
def test_what_an_algorithm_refuses(faults, changes, key, found):
    refused = faults("ppo", **changes)
    assert list(refused) == [key]
    assert refused[key].found.startswith(found)


def test_the_horizon_of_an_adaptive_penalty(load):
    assert load("ppo").kl_horizon is None
    assert load("ppo", kl_target=6).kl_horizon == 10_000


def test_a2c_accumulates_over_the_whole_rollout(load):
    config = load("ppo", algorithm="a2c", gradient_accumulation_steps=4)
    assert (config.rollout_batch_size, config.minibatch_size) == (32, 32)
