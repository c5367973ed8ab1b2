from __future__ import annotations

import json

import pytest

from rlhf_pipeline.errors import DamagedFile, MismatchError
from rlhf_pipeline.registry.roles import check_role


@pytest.mark.parametrize(
    ("stage", "role"), [("sft", "policy"), ("ppo", "policy"), ("dpo", "policy"), ("reward", "reward_model")]
)
def test_stage_decides_the_role(registry, model, stage, role):
    made = registry.publish("demo", stage, model())
    check_role(made, role)
    other = "reward_model" if role == "policy" else "policy"
    with pytest.raises(MismatchError, match=rf"demo@v1: a .* of the stage {stage}; expected a .*name "):
        check_role(made, other)


@pytest.mark.parametrize(
    ("architecture", "role"),
    [
        ("LlamaForCausalLM", "policy"),
        ("GPT2LMHeadModel", "policy"),
        ("LlamaForSequenceClassification", "reward_model"),
    ],
)
def test_architecture_decides_for_a_folder(registry, model, tmp_path, architecture, role):
    model(architecture=architecture)(tmp_path)
    folder = registry.resolve(tmp_path)
    check_role(folder, role)
    with pytest.raises(MismatchError, match=architecture):
        check_role(folder, "reward_model" if role == "policy" else "policy")


def test_task_decides_for_an_adapter(registry, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": "SEQ_CLS"}))
    check_role(registry.resolve(tmp_path), "reward_model")
    with pytest.raises(MismatchError, match="an adapter for the task SEQ_CLS"):
        check_role(registry.resolve(tmp_path), "policy")


def test_other_architectures_play_no_role(registry, model, tmp_path):
    model(architecture="BertForMaskedLM")(tmp_path)
    for role in ("policy", "reward_model"):
        with pytest.raises(MismatchError, match="BertForMaskedLM"):
            check_role(registry.resolve(tmp_path), role)


def test_what_cannot_be_told_yet_passes(registry, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for reference in (tmp_path, "org/name"):
        check_role(registry.resolve(reference), "policy")
        check_role(registry.resolve(reference), "reward_model")


def test_data_are_no_model(registry):
    with pytest.raises(MismatchError, match="collected data"):
        check_role(registry.publish_data("pairs", [{"prompt": "x"}]), "policy")


def test_unreadable_config_is_damaged(registry, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"config\.json: not valid JSON"):
        check_role(registry.resolve(tmp_path), "policy")
