"""`fsdp`: transformers' words for it, and what it is refused with."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.dump import config_digest

CHOSEN = {"reward_centering": "chosen"}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        *((True, True), ("full_shard", True), ("full_shard auto_wrap", True), (["full_shard"], True), ("true", True)),
        *((False, False), ("", False), ([], False), ("false", False)),
    ],
)
def test_the_words_of_transformers(load, given, read):
    assert load("dpo", fsdp=given).fsdp is read


@pytest.mark.parametrize(
    "given", ["shard_grad_op", "full_shard offload", "hybrid_shard", 1, {"full_shard": True}, [{}]]
)
def test_another_way_to_divide_is_refused(faults, given):
    assert "true or false" in faults("dpo", fsdp=given)["fsdp"].expected


@pytest.mark.parametrize(
    ("stage", "changes", "key"),
    [
        ("ppo", {"micro_batch_tokens": 64}, "micro_batch_tokens"),
        ("sft", {"engine": "trl"}, "engine"),
        ("dpo", {"use_peft": True, "load_in_4bit": True}, "load_in_4bit"),
        ("sft", {"optim": "muon"}, "optim"),
        ("sft", {"optim": "adafactor"}, "optim"),
        ("sft", {"optim": "adamw_8bit"}, "optim"),
        ("sft", {"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ("dpo", {"dataset_name": "world:verdicts", "max_steps": 2}, "dataset_name"),
        ("train-rm", {}, "reward_centering"),
    ],
)
def test_what_needs_whole_weights_is_refused(faults, stage, changes, key):
    assert key in faults(stage, fsdp=True, **changes)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {"optim": "lion"}),
        ("dpo", {"use_peft": True}),
        ("train-rm", CHOSEN),
        ("train-rm", {**CHOSEN, "bf16": True}),
    ],
)
def test_it_is_no_part_of_a_runs_digest(load, stage, changes):
    """A run that was begun with it continues without it."""
    assert config_digest(load(stage, fsdp=True, **changes)) == config_digest(load(stage, **changes))
