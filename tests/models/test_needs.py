"""What a run needs of its models is known before it trains, in the run and in its dry run."""

from __future__ import annotations

import json
import shutil

import pytest

from rlhf_pipeline.errors import BadInput, ConfigError
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.measure.evaluate import run_evaluate
from rlhf_pipeline.models.needs import remarks_on
from rlhf_pipeline.registry.lengths import positions_in

SHORT, LONG = [1.0, 1.0], [4.0, 4.0]
LONGROPE = {"short_factor": SHORT, "long_factor": LONG}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"model_type": "llama", "max_position_embeddings": 64}, 64),
        ({"model_type": "gpt2", "n_positions": 64}, 64),
        ({"model_type": "mpt", "max_seq_len": 64}, 64),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 64}}, 64),
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "longrope", **LONGROPE},
          "original_max_position_embeddings": 32}, 32),
        ({"max_position_embeddings": 128, "rope_parameters": {
            "rope_type": "longrope", "original_max_position_embeddings": 32, **LONGROPE}}, 32),
        ({"max_position_embeddings": 128, "rope_parameters": {
            "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 32},
            "sliding_attention": {"rope_type": "default"}}}, 32),
        ({"text_config": {"max_position_embeddings": 128, "rope_scaling": {
            "rope_type": "su", "original_max_position_embeddings": 32}}}, 32),
        ({"max_position_embeddings": 128, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 128),
        ({"model_type": "bloom"}, None),
    ],
)  # fmt: skip
def test_positions_of_configs(config, positions):
    assert positions_in(config)[0] == positions


def folder_with(lab, tmp_path, base="sft", **changes):
    """A copy of a model with other values in its config.json, without a manifest."""
    folder = tmp_path / "model"
    shutil.copytree(lab.home / "models" / base / "v1", folder)
    (folder / "manifest.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def refusal_of(lab, stage, **changes) -> str:
    """The same refusal of the dry run and of the run; nothing is left of the run."""
    told = []
    for attempt in (lambda: estimate_stage(lab.config(stage, **changes), lab.home), lambda: lab.run(stage, **changes)):
        with pytest.raises(BadInput) as caught:
            attempt()
        told.append(str(caught.value))
    assert told[0] == told[1] and not list((lab.home / "runs").glob("*"))
    return told[0]


@pytest.mark.parametrize(
    ("stage", "role"),
    [
        *((stage, "model_name_or_path") for stage in ("sft", "train-rm", "dpo", "ppo")),
        ("collect", "policy"), ("dpo", "ref_model"), ("ppo", "reward_model_path"), ("ppo", "judge"),
    ],
)  # fmt: skip
def test_too_few_positions_of_any_model(lab, tmp_path, stage, role):
    base = "reward" if role in ("reward_model_path", "judge") else "sft"
    folder = folder_with(lab, tmp_path, base, max_position_embeddings=9)
    told = refusal_of(lab, stage, **{role: folder})  # a prompt of 6 and a response of 4
    assert f"at most 9, the positions of {folder}" in told


def test_longrope_beyond_its_original_length(lab, tmp_path):
    """One sequence over the original length changes the angles of all others in its batch."""
    rope = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 8,
        "factor": 4.0,
        "rope_theta": 1e4,
        **LONGROPE,
    }
    folder = folder_with(lab, tmp_path, rope_parameters=rope)
    assert "at most 8, the original positions (beyond them, longrope makes" in refusal_of(
        lab, "dpo", model_name_or_path=folder
    )


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_an_attention_kernel_that_is_not_here(lab, stage):
    told = refusal_of(lab, stage, attn_implementation="flash_attention_2")
    assert told.startswith("attn_implementation: 'flash_attention_2' cannot be used here (")


def test_an_attention_kernel_that_the_architecture_does_not_have(lab):
    scratch = {"model_name_or_path": None, "tokenizer_init": {"type": "world"}, "dataset_name": "world:verdicts"}
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}
    told = refusal_of(lab, "sft", model_init=bloom, attn_implementation="sdpa", **scratch)
    assert told.startswith("attn_implementation: 'sdpa' cannot be used here (BloomForCausalLM does not support")


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_weights_in_float16_are_not_trained(lab, tmp_path, stage):
    with pytest.raises(ConfigError, match="dtype: float16 cannot be trained"):
        lab.config(stage, dtype="float16")
    folder = folder_with(lab, tmp_path, dtype="float16")
    told = refusal_of(lab, stage, model_name_or_path=folder, dtype="auto")
    assert told.startswith(f"dtype: auto, and {folder} is stored in float16, in which AdamW's epsilon rounds to 0")


def test_a_router_loss_that_is_not_added_is_said(lab, tmp_path):
    folder = folder_with(lab, tmp_path, output_router_logits=True, router_aux_loss_coef=0.5)
    assert remarks_on(lab.registry.resolve("sft")) == []
    expected = [
        f"note: router_aux_loss_coef 0.5 of {folder} has no effect: the loss that balances its experts is not added"
    ]
    assert remarks_on(lab.registry.resolve(folder)) == expected
    assert expected[0] in estimate_stage(lab.config("dpo", model_name_or_path=folder), lab.home)["data"]
    result = lab.run("dpo", model_name_or_path=folder, max_steps=1)
    assert expected[0] in (lab.home / "runs" / result.run / "log.txt").read_text()


@pytest.mark.parametrize("role", ["reference", "reward_model"])
def test_too_few_positions_of_a_model_that_is_measured_with(lab, tmp_path, role):
    folder = folder_with(lab, tmp_path, "sft" if role == "reference" else "reward", max_position_embeddings=7)
    few = {"prompts": "world:verdicts", "max_prompts": 4, "samples": 2, "max_new_tokens": 4}
    config = lab.config("evaluate", **few, **{role: folder})
    with pytest.raises(ConfigError, match=f"max-new-tokens: a prompt of up to .* at most 7, the positions of {folder}"):
        run_evaluate("sft", config, lab.home)


def test_too_few_positions_of_the_base_of_an_adapter(lab, tmp_path):
    """An adapter as peft saves it has no config.json: the positions are those of its base."""
    base = folder_with(lab, tmp_path, max_position_embeddings=9)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert f"at most 9, the positions of {adapter}" in refusal_of(lab, "dpo", model_name_or_path=str(adapter))


@pytest.mark.parametrize("stage", ["train-rm", "dpo", "ppo"])
def test_a_chat_template_that_is_not_there(lab, tmp_path, stage):
    turns = [[{"role": role, "content": text}] for role, text in (("user", "the plot was"), ("assistant", "great"))]
    row = {"prompt": turns[0], "chosen": turns[1], "rejected": [{"role": "assistant", "content": "dull"}]}
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(row) + "\n")
    told = refusal_of(lab, stage, dataset_name=str(data), dataset_train_split="all")
    assert "the tokenizer has no chat template" in told
