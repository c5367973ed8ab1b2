"""Keys of adapters: what is refused before anything is loaded, and what is only said."""

from __future__ import annotations

import importlib.util

import pytest

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.load import load_config

STAGES = ("sft", "train-rm", "dpo", "ppo")


@pytest.mark.parametrize("stage", STAGES)
def test_the_keys_have_trls_names_and_sizes(load, stage):
    config = load(stage, use_peft=True)
    assert (config.lora_r, config.lora_alpha, config.lora_target_modules, config.use_dora) == (16, 32, None, False)
    listed = load(stage, use_peft=True, lora_target_modules=["q_proj", "v_proj"], lora_task_type="CAUSAL_LM")
    assert listed.lora_target_modules == ("q_proj", "v_proj")
    assert load(stage, use_peft=True, lora_target_modules="all-linear").lora_target_modules == ("all-linear",)


@pytest.mark.parametrize(("key", "value"), [("lora_r", 8), ("use_dora", True), ("lora_modules_to_save", ["lm_head"])])
def test_an_adapter_that_nobody_asked_for_is_refused(faults, load, key, value):
    """All weights would be trained, and the key would do nothing."""
    assert "without use_peft" in faults("dpo", **{key: value})[key].found
    if value is not True:
        assert load("dpo", use_peft=False, **{key: value}).use_peft is False  # said plainly, as TRL's recipes do
    else:
        assert "without use_peft" in faults("dpo", use_peft=False, **{key: value})[key].found


@pytest.mark.parametrize("stage", STAGES)
def test_4_bits_have_trls_names_and_need_an_adapter_and_bitsandbytes(faults, load, monkeypatch, stage):
    found = importlib.util.find_spec
    given = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"}
    for there in (True, False):
        answers = {"bitsandbytes": object() if there else None}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, known=answers: known.get(name, found(name)))
        if there:
            assert FourBits.of(load(stage, use_peft=True, **given)) == FourBits("nf4", nested=True)
            assert FourBits.of(load(stage, use_peft=True)) is None
            assert "so all weights would be trained" in faults(stage, load_in_4bit=True)["load_in_4bit"].found
            idle = faults(stage, use_peft=True, bnb_4bit_quant_type="fp4")["bnb_4bit_quant_type"]
            assert "without load_in_4bit" in idle.found
        else:
            refused = faults(stage, use_peft=True, load_in_4bit=True)["load_in_4bit"]
            assert "no package bitsandbytes" in refused.found and "pip install 'bitsandbytes>=0.50'" in refused.fix


def test_without_peft_the_key_says_what_to_install(faults, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    assert "pip install" in faults("dpo", use_peft=True)["use_peft"].fix


def test_random_weights_take_no_adapter(faults):
    fresh = {"model_name_or_path": None, "model_init": {"model_type": "llama"}, "tokenizer_init": "world"}
    assert list(faults("sft", use_peft=True, **fresh)) == ["use_peft"]


def test_ppo_says_that_it_uses_no_dropout(valid):
    loaded = load_config("ppo", None, extra={**valid["ppo"], "use_peft": True, "lora_dropout": 0.05})
    assert any("lora_dropout 0.05 is not used" in note for note in loaded.notes)


def test_a_shared_base_needs_adapters(faults, load):
    assert list(faults("ppo", shared_base=True)) == ["shared_base"]
    assert load("ppo", use_peft=True, shared_base=True).shared_base


def test_dropout_is_a_probability(faults):
    assert list(faults("dpo", use_peft=True, lora_dropout=1)) == ["lora_dropout"]
