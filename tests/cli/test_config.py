"""`rlhf config keys` and `rlhf config schema`."""

from __future__ import annotations

import json

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.stages import SCHEMAS


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", SCHEMAS)
def test_every_key_of_every_command(capsys, stage: str) -> None:
    found = json.loads(printed(capsys, "config", "keys", stage, "--json"))
    assert found["stage"] == stage
    assert [key["name"] for key in found["keys"]] == list(SCHEMAS[stage].model_fields)
    assert all(key["type"] and key["description"] for key in found["keys"])


def test_types_and_defaults_in_words(capsys) -> None:
    found = {key.pop("name"): key for key in json.loads(printed(capsys, "config", "keys", "ppo", "--json"))["keys"]}
    kinds = {name: (key["type"], key["default"], key["required"]) for name, key in found.items()}
    assert kinds["learning_rate"] == ("number > 0", 3e-6, False)
    assert kinds["lam"] == ("number >= 0 and <= 1 or null", 0.95, False)
    assert kinds["rollout_batch_size"] == ("whole number >= 1", 64, False)
    assert kinds["whiten_rewards"] == ("true or false or null", False, False)
    assert kinds["value_init"] == ("reward_model, sft or shared or null", None, False)
    assert kinds["output_name"] == ("text", None, True)
    assert kinds["reward_functions"] == ("list (mapping of source, weight, llm_judge) or null", None, False)
    assert found["num_ppo_epochs"]["description"] == "passes over each rollout (TRL); a2c: 1"


def test_the_table_has_a_line_for_each_key(capsys) -> None:
    out = printed(capsys, "config", "keys", "dpo")
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["beta", "number"]]
    assert line.split()[:6] == ["beta", "number", ">", "0", "0.1", "strength"]
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["output_name"]]
    assert "required" in line


@pytest.mark.parametrize("stage", SCHEMAS)
def test_the_schema(capsys, stage: str) -> None:
    schema = json.loads(printed(capsys, "config", "schema", stage))
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(SCHEMAS[stage].model_fields)
    required = {name for name, field in SCHEMAS[stage].model_fields.items() if field.is_required()}
    assert set(schema.get("required", ())) == required


def test_an_unknown_command_is_refused(capsys) -> None:
    for word in ("keys", "schema"):
        assert main(["config", word, "dop"]) == 2
        error = capsys.readouterr().err
        assert "found 'dop'; expected one of sft, train-rm, ppo" in error and "did you mean 'dpo'?" in error
