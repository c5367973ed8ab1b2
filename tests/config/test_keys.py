from __future__ import annotations

import pytest

from rlhf_pipeline.config.keys import ALIASES, FIXED, LATER, NOT_USED, REFUSED
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.stages import SCHEMAS, STAGES, TRAINING
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


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("dpo", "lora_whatever", 1),
        ("dpo", "load_in_8bit", True),
    ],
)
def test_keys_of_later_versions_are_refused_by_name(faults, stage, key, value):
    refused = faults(stage, **{key: value})
    assert list(refused) == [key]
    assert "not available yet in this version" in refused[key].found


@pytest.mark.parametrize("key", LATER)
def test_keys_of_later_versions_may_say_off(valid, key):
    for stage in TRAINING:
        for neutral in LATER[key]:
            load_config(stage, None, extra={**valid[stage], key: neutral} if neutral is not None else valid[stage])


def test_an_override_can_turn_a_later_key_off_again(valid):
    extra = {**valid["dpo"], "load_in_8bit": True}
    assert load_config("dpo", None, ["load_in_8bit=false"], extra=extra).config.beta == 0.1


def test_the_population_of_the_world_is_a_source_of_dpo_alone(faults, load):
    changes = {"dataset_name": "world:verdicts", "dataset_config": "population", "max_steps": 5}
    assert load("dpo", **changes).population
    for stage in ("sft", "train-rm", "ppo"):
        assert "for `rlhf dpo` only" in faults(stage, **changes)["dataset_config"].fix
    assert "no epochs" in faults("dpo", **{**changes, "max_steps": -1})["max_steps"].expected


@pytest.mark.parametrize("value", [True, False, None, "info", 3])
@pytest.mark.parametrize("key", sorted(NOT_USED))
def test_a_key_for_logging_uploading_or_speed_takes_any_value_with_a_note(valid, key, value):
    plain = load_config("dpo", None, extra=valid["dpo"])
    loaded = load_config("dpo", None, extra={**valid["dpo"], key: value})
    assert loaded.config == plain.config and loaded.notes == (f"dpo: {key}: not used here",)


@pytest.mark.parametrize(
    ("key", "accepted", "others", "advice"),
    [
        ("do_train", [True, None], [False], "a stage always trains"),
        ("fp16", [False, None], [True, 0], "use bf16"),
        ("tf32", [False, None], [True], "use bf16"),
        ("logging_strategy", ["steps"], ["epoch", "no"], "logging_steps"),
        ("dataset_text_field", ["text", None], ["content"], "rename the column"),
        ("dataset_streaming", [False], [True], "rlhf data fetch SOURCE DIR"),
        ("streaming", [False], [True], "rlhf data fetch SOURCE DIR"),
        ("dataset_kwargs", [{"add_special_tokens": False}], [{"add_special_tokens": True}, True], "special tokens"),
        ("average_tokens_across_devices", [True, None], [False, 1], "divides once"),
        ("num_processes", [1, None], [4, True], "accelerate launch"),
        ("packing", [False, None], [True], "a step keeps its examples"),
        ("lora_task_type", ["CAUSAL_LM", "SEQ_CLS", None], ["SEQ_2_SEQ_LM"], "the stage sets"),
        ("bnb_4bit_quant_storage", ["uint8", None], ["bfloat16"], "as bytes"),
        ("bnb_4bit_compute_dtype", [None], ["bfloat16"], "set dtype"),
        ("kl_estimator", ["k1"], ["k3"], "log-ratio"),
    ],
)
def test_a_key_that_would_train_differently_is_refused_unless_it_says_what_a_run_does(
    valid, faults, key, accepted, others, advice
):
    for value in accepted:
        loaded = load_config("dpo", None, extra={**valid["dpo"], key: value})
        assert loaded.notes == (f"dpo: {key}: not used here: a run does the same without it",)
    for value in others:
        refused = faults("dpo", **{key: value})
        assert (
            list(refused) == [key] and refused[key].fix.startswith("remove it, or set ") and advice in refused[key].fix
        )


def test_every_fixed_key_has_its_case():
    (mark,) = test_a_key_that_would_train_differently_is_refused_unless_it_says_what_a_run_does.pytestmark
    assert {case[0] for case in mark.args[1]} == set(FIXED)


@pytest.mark.parametrize("value", [True, False])
def test_dropout_is_not_switched_by_the_key_of_trl(faults, value):
    """`dropout: true` of sft with `disable_dropout: true` would train with dropout."""
    refused = faults("sft", dropout=True, disable_dropout=value)
    assert list(refused) == ["disable_dropout"] and "`dropout: true`" in refused["disable_dropout"].fix


def test_a_key_of_another_stage_says_so(faults):
    assert faults("ppo", loss_type="sigmoid")["loss_type"].fix == "it is a key of dpo"
    assert faults("sft", gamma=1)["gamma"].fix == "it is a key of ppo"


def test_the_tables_name_real_keys():
    for stage, aliases in ALIASES.items():
        fields = SCHEMAS[stage].model_fields
        assert set(aliases.values()) <= set(fields)
        assert not set(aliases) & set(fields)
    fields = {name for schema in STAGES.values() for name in schema.model_fields}
    # packing is a key of sft; in the other stages it is fixed.
    assert (NOT_USED | FIXED.keys() | REFUSED.keys()) & fields == {"packing"}
    assert not NOT_USED & FIXED.keys() and not (NOT_USED | FIXED.keys()) & (LATER.keys() | REFUSED.keys())
