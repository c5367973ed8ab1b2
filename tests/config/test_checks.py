from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("stage", "changes", "key", "found"),
    [
        ("dpo", {"beta": -0.1}, "beta", "found -0.1"),
        ("dpo", {"beta": 0}, "beta", "found 0"),
        ("ppo", {"kl_coef": -0.1}, "kl_coef", "found -0.1"),
        ("sft", {"learning_rate": 0}, "learning_rate", "found 0"),
        ("ppo", {"temperature": 0}, "temperature", "found 0"),
        ("ppo", {"cliprange": 0}, "cliprange", "found 0"),
        ("ppo", {"lam": 1.1}, "lam", "found 1.1"),
        ("ppo", {"gamma": -0.1}, "gamma", "found -0.1"),
        ("collect", {"k": 1}, "k", "found 1"),
        ("sft", {"max_steps": 0}, "max_steps", "found 0"),
        (
            "sft",
            {"split_fractions": {"train": 0.5, "test": 0.4}},
            "split_fractions",
            "the fractions sum to 0.9",
        ),
        ("sft", {"split_fractions": {"train": 1.5, "test": -0.5}}, "split_fractions.test", "found -0.5"),
        ("dpo", {"model_name_or_path": None}, "model_name_or_path", "missing"),
        ("sft", {"model_name_or_path": None}, "model_name_or_path", "missing"),
        ("sft", {"dataset_name": None}, "dataset_name", "missing"),
        ("sft", {"datasets": [{"dataset_name": "a"}]}, "datasets", "dataset_name is also given"),
        ("sft", {"dataset_name": "world:other"}, "dataset_name", "found 'world:other'"),
        ("sft", {"dataset_name": "world:verdicts", "dataset_config": "x"}, "dataset_config", "found 'x'"),
        ("collect", {"prompts": "world:other"}, "prompts", "found 'world:other'"),
        (
            "sft",
            {"model_init": {"model_type": "llama"}, "tokenizer_init": "world"},
            "model_init",
            "model_name_or_path",
        ),
        ("sft", {"tokenizer_init": "world"}, "tokenizer_init", "the model of model_name_or_path"),
        *((stage, {"dtype": "float16"}, "dtype", "float16 cannot be trained") for stage in ("sft", "ppo", "dpo")),
        ("sft", {"eval_strategy": "epoch", "eval_steps": 5}, "eval_steps", "eval_strategy 'epoch'"),
        ("sft", {"warmup_steps": 9, "max_steps": 8}, "warmup_steps", "warm-up of 9 steps in a run of 8"),
        (
            "sft",
            {"warmup_steps": 0.1, "lr_scheduler_type": "constant"},
            "warmup_steps",
            "lr_scheduler_type constant",
        ),
        ("sft", {"max_length": 1}, "max_length", "max_length 1 leaves"),
        ("ppo", {"reward_model_path": None}, "reward_model_path", "missing"),
        ("ppo", {"reward_functions": ["world"]}, "reward_functions", "reward_model_path is also given"),
        ("ppo", {"reward_model_path": "world"}, "reward_model_path", "'world' is not a reward model"),
        ("ppo", {"reward_model_path": "m:f"}, "reward_model_path", "'m:f' is not a reward model"),
        (
            "ppo",
            {"reward_model_path": None, "reward_functions": ["a b:f"]},
            "reward_functions.0.source",
            "found 'a b:f'",
        ),
        (
            "ppo",
            {"reward_model_path": None, "reward_functions": ["world"], "value_init": "reward_model"},
            "value_init",
            "value_init is reward_model",
        ),
        ("ppo", {"judge": "reward"}, "judge", "'reward' is the reward that the policy is trained on"),
        (
            "ppo",
            {"reward_model_path": None, "reward_functions": ["m:f", "world"], "judge": "world"},
            "judge",
            "'world' is the reward",
        ),
        ("ppo", {"judge": "a b:f"}, "judge", "found 'a b:f'"),
        ("ppo", {"judge": ""}, "judge", "found ''"),
        ("ppo", {"total_episodes": None}, "total_episodes", "missing"),
        ("ppo", {"total_episodes": 63}, "total_episodes", "63 episodes do not fill one rollout of 64"),
        ("ppo", {"num_train_epochs": 2}, "num_train_epochs", "found 2, but ppo counts episodes"),
        ("ppo", {"eval_strategy": "epoch"}, "eval_strategy", "found 'epoch'"),
        ("ppo", {"num_mini_batches": 3}, "num_mini_batches", "rollout_batch_size 64 is not a multiple"),
        ("ppo", {"num_generations": 3}, "num_generations", "rollout_batch_size 64 is not a multiple"),
        ("ppo", {"num_generations": 0}, "num_generations", "found 0"),
        ("ppo", {"freeze_layers": 1, "use_peft": True}, "freeze_layers", "found 1 with use_peft"),
        ("ppo", {"per_device_train_batch_size": 5}, "per_device_train_batch_size", "a minibatch of 16"),
        (
            "ppo",
            {"gradient_accumulation_steps": 4, "rollout_batch_size": 64},
            "gradient_accumulation_steps",
            "found 4, but a minibatch of 16",
        ),
        ("ppo", {"warmup_steps": 11}, "warmup_steps", "warm-up of 11 updates in a run of 10"),
        ("ppo", {"critic_warmup_steps": 10}, "critic_warmup_steps", "the actor is frozen for 10 updates"),
        ("sft", {"report_to": [{"type": "wandb"}]}, "report_to.0", "found {'type': 'wandb'}"),
        (
            "sft",
            {"chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs.tools",
            "a variable that is always given",
        ),
        (
            "dpo",
            {"chat_template_kwargs": {"add_generation_prompt": True}},
            "chat_template_kwargs.add_generation_prompt",
            "a variable that is always given",
        ),
        ("compare", {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages", "a variable"),
        ("compare", {"arms": ["a", "a", "b"]}, "arms.1", "'a' is named twice"),
        ("compare", {"arms": ["a"]}, "arms", "'a' is the only model"),
        ("compare", {"baseline": "a"}, "baseline", "'a' is also an arm"),
    ],
)
def test_one_fault_under_its_key(faults, stage, changes, key, found):
    refused = faults(stage, **changes)
    assert list(refused) == [key]
    assert refused[key].found.startswith(found)


@pytest.mark.parametrize(
    "tokenizer", ["byte_level_bpe", {"type": "byte_level_bpe", "vocab_size": 257}, {"type": "x"}, {}, 3]
)
def test_tokenizers_from_scratch_that_do_not_exist(faults, tokenizer):
    changes = {"model_name_or_path": None, "model_init": {"model_type": "llama"}, "tokenizer_init": tokenizer}
    assert list(faults("sft", **changes)) == ["tokenizer_init"]


def test_a_model_from_scratch_needs_a_type_a_tokenizer_and_positions(faults):
    scratch = {"model_name_or_path": None, "tokenizer_init": "world"}
    assert faults("sft", **scratch, model_init={"hidden_size": 64})["model_init"].fix == "add model_type: llama"
    refused = faults("sft", model_name_or_path=None, model_init={"model_type": "llama"})
    assert refused["tokenizer_init"].found == "missing"
    init = {"model_type": "llama", "max_position_embeddings": 30}
    refused = faults("sft", **scratch, model_init=init, max_length=31)
    assert refused["model_init.max_position_embeddings"].found == "30 positions for sequences of up to 31 tokens"


def test_the_divisors_of_a_minibatch_are_named(faults):
    refused = faults("ppo", rollout_batch_size=16)
    assert refused["per_device_train_batch_size"].expected == "one of 1, 2, 4"


def test_values_at_the_edge_are_allowed(load):
    load("ppo", kl_coef=0, lam=0, gamma=0, warmup_steps=10, critic_warmup_steps=9, total_episodes=640)
    load("ppo", gradient_accumulation_steps=2, max_steps=1, total_episodes=None)
    load("sft", warmup_steps=8, max_steps=8, max_grad_norm=0)
    load("compare", arms=["a"], baseline="b")
    load("sft", dataset_name=None, datasets=[{"dataset_name": "a", "weight": 0.5}, {"dataset_name": "b"}])


def test_a_labeller_that_is_no_source_is_refused_as_ppos_rewards_are(faults):
    for stage in ("collect", "ppo"):
        fault = faults(stage, judge="a b:f")["judge"]
        assert (fault.found, fault.expected) == ("found 'a b:f'", "world, a reward model, or module:function")
