from __future__ import annotations

import pytest

from rlhf_pipeline.config import STAGES, load_config
from rlhf_pipeline.config.keys import ALIASES, LATER, WITHOUT_EFFECT
from rlhf_pipeline.config.stages import SCHEMAS
from rlhf_pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("stage", "alias", "value", "canonical", "expected"),
    [
        ("dpo", "torch_dtype", "bfloat16", "dtype", "bfloat16"),
        ("dpo", "warmup_ratio", 0.1, "warmup_steps", 0.1),
        ("dpo", "evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("dpo", "max_completion_length", 9, "response_length", 9),
        ("dpo", "max_seq_length", 99, "max_length", 99),
        ("ppo", "max_new_tokens", 9, "response_length", 9),
        ("ppo", "beta", 0.3, "kl_coef", 0.3),
        ("ppo", "sft_model_path", "org/model", "model_name_or_path", "org/model"),
        ("ppo", "reward_model", "rm", "reward_model_path", "rm"),
        ("collect", "model_name_or_path", "org/model", "policy", "org/model"),
        ("collect", "name", "harvest", "output_name", "harvest"),
    ],
)
def test_an_alias_is_its_canonical_key_with_a_note(valid, stage, alias, value, canonical, expected):
    values = valid[stage]
    values.pop(canonical, None)
    loaded = load_config(stage, None, extra={**values, alias: value})
    assert getattr(loaded.config, canonical) == expected
    (note,) = loaded.notes
    assert note.startswith(f"{stage}: {alias}: a") and canonical in note


def test_an_alias_and_its_canonical_key_together_are_a_fault(faults):
    assert faults("ppo", kl_coef=0.1, beta=0.2)["beta"].found.startswith("the same key as kl_coef")
    assert "warmup_ratio" in faults("dpo", warmup_steps=3, warmup_ratio=0.2)


def test_an_override_by_alias_wins_over_the_canonical_key_of_the_file(valid):
    extra = {**valid["ppo"], "kl_coef": 0.1}
    assert load_config("ppo", None, ["beta=.7"], extra=extra).config.kl_coef == 0.7
    with pytest.raises(ConfigError, match="kl_coef and beta are the same key"):
        load_config("ppo", None, ["kl_coef=.1", "beta=.7"], extra=extra)
    assert load_config("ppo", None, ["beta=.7", "beta=.8"], extra=extra).config.kl_coef == 0.8


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, "x", True])
def test_a_warmup_ratio_is_a_fraction(faults, ratio):
    assert faults("sft", warmup_ratio=ratio)["warmup_ratio"].expected == "a fraction of all steps, 0 <= ratio < 1"


def test_max_new_tokens_is_a_key_of_evaluate_itself(load):
    assert load("evaluate", max_new_tokens=5).max_new_tokens == 5


def test_output_dir_is_refused_with_what_to_use(faults):
    assert faults("sft", output_dir="out")["output_dir"].fix.startswith("use output_name")


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("dpo", "use_peft", True),
        ("dpo", "lora_r", 16),
        ("dpo", "lora_whatever", 1),
        ("dpo", "load_in_4bit", True),
        ("ppo", "kl_target", 6),
        ("sft", "load_best_model_at_end", True),
        ("sft", "report_to", "wandb"),
        ("sft", "report_to", ["tensorboard"]),
    ],
)
def test_keys_of_later_versions_are_refused_by_name(faults, stage, key, value):
    refused = faults(stage, **{key: value})
    assert list(refused) == [key]
    assert "not available yet in this version" in refused[key].found


@pytest.mark.parametrize("key", LATER)
def test_keys_of_later_versions_may_say_off(valid, key):
    for stage in LATER[key].stages:
        for neutral in LATER[key].neutral:
            load_config(stage, None, extra={**valid[stage], key: neutral} if neutral is not None else valid[stage])


def test_an_override_can_turn_a_later_key_off_again(valid):
    extra = {**valid["dpo"], "use_peft": True}
    assert load_config("dpo", None, ["use_peft=false"], extra=extra).config.beta == 0.1


def test_the_population_of_the_world_is_a_source_of_dpo_alone(faults, load):
    changes = {"dataset_name": "world:verdicts", "dataset_config": "population", "max_steps": 5}
    assert load("dpo", **changes).population
    for stage in ("sft", "train-rm", "ppo"):
        assert "of `rlhf dpo` alone" in faults(stage, **changes)["dataset_config"].fix
    assert "no epochs" in faults("dpo", **{**changes, "max_steps": -1})["max_steps"].expected


def test_keys_of_trl_that_change_nothing_are_left_out_with_a_note(valid):
    extra = {**valid["dpo"], "push_to_hub": False, "optim": "adamw_torch", "log_level": "info"}
    loaded = load_config("dpo", None, extra=extra)
    assert loaded.notes == tuple(
        f"dpo: {key}: has no effect here, left out" for key in ("push_to_hub", "optim", "log_level")
    )


def test_keys_of_trl_that_would_change_something_are_refused(faults):
    refused = faults("dpo", push_to_hub=True, optim="sgd")
    assert refused["push_to_hub"].fix == "only false is possible in this version: remove it"
    assert refused["optim"].fix.startswith("only adamw_torch or adamw_torch_fused is possible")


def test_a_key_of_another_stage_says_so(faults):
    assert faults("ppo", loss_type="sigmoid")["loss_type"].fix == "it is a key of dpo"
    assert faults("sft", gamma=1)["gamma"].fix == "it is a key of ppo"


def test_the_tables_name_real_keys():
    for stage, aliases in ALIASES.items():
        fields = SCHEMAS[stage].model_fields
        assert {alias.canonical for alias in aliases.values()} <= set(fields)
        assert not set(aliases) & set(fields)
    assert not set(WITHOUT_EFFECT) & {name for schema in STAGES.values() for name in schema.model_fields}
