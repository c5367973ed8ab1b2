"""Things that do not belong together are refused, with both named, before anything is trained."""

from __future__ import annotations

import pytest

from rlhf_pipeline.errors import DamagedFile, DataError, MismatchError


@pytest.fixture(scope="module")
def two_tokenizers(tiny, tmp_path_factory):
    """The laboratory with a second policy, `text`, whose tokenizer is another, and a reward model of it."""
    import json

    folder = tmp_path_factory.mktemp("two")
    lab = tiny.copy(folder / "home")
    rows = [{"prompt": f"question {i}:", "completion": f" answer {i % 7}"} for i in range(30)]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llama = tiny.registry.resolve("sft").manifest.config["model_init"]
    lab.run(
        "sft",
        output_name="text",
        model_name_or_path=None,
        model_init={**llama, "max_position_embeddings": 64},
        tokenizer_init={"type": "byte_level_bpe", "vocab_size": 280},
        dataset_name=str(folder / "demos.jsonl"),
        dataset_train_split="all",
        max_prompt_length=24,
        response_length=24,
        max_steps=1,
    )
    pairs = [{"prompt": f"question {i}:", "chosen": f" answer {i % 7}", "rejected": " no"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    lab.run(
        "train-rm",
        output_name="text-reward",
        model_name_or_path="text",
        dataset_name=str(folder / "pairs.jsonl"),
        dataset_train_split="all",
        max_prompt_length=24,
        response_length=24,
        max_steps=1,
        reward_centering_samples=8,
    )
    return lab


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_a_reward_model_is_no_policy(lab, stage):
    with pytest.raises(MismatchError, match=r"reward@v1.*a policy"):
        lab.run(stage, model_name_or_path="reward")


def test_a_reward_model_is_no_reference(lab):
    with pytest.raises(MismatchError, match="reward@v1"):
        lab.run("dpo", ref_model="reward")


def test_a_policy_is_no_reward_model(lab):
    with pytest.raises(MismatchError, match=r"sft@v1.*a reward model"):
        lab.run("ppo", reward_model_path="sft")
    with pytest.raises(MismatchError, match=r"sft@v1.*a reward model"):
        lab.run("collect", judge="sft")
    with pytest.raises(MismatchError, match=r"reward@v1.*a policy"):
        lab.run("collect", policy="reward")


def test_nothing_appears_where_a_stage_is_refused(lab):
    with pytest.raises(MismatchError):
        lab.run("ppo", reward_model_path="sft")
    assert lab.registry.models.names() == ["reward", "sft"]


def test_a_reward_model_with_another_tokenizer(two_tokenizers):
    with pytest.raises(MismatchError, match=r"text-reward@v1.*tokenizer.*sft@v1"):
        two_tokenizers.run("ppo", reward_model_path="text-reward")


def test_the_world_judges_its_own_words_only(two_tokenizers):
    text = {"max_prompt_length": 24, "response_length": 4}
    with pytest.raises(MismatchError, match="world:verdicts"):
        two_tokenizers.run("ppo", model_name_or_path="text", reward_model_path=None, reward_functions=["world"], **text)
    with pytest.raises(MismatchError, match="world:verdicts"):
        two_tokenizers.run("collect", policy="text", **text)


def test_damaged_weights_are_refused(lab):
    with (lab.registry.resolve("sft").path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xa5")
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        lab.run("dpo")


def test_prompts_alone_are_no_pairs(lab):
    with pytest.raises(DataError, match="prompt"):
        lab.run("train-rm", dataset_name="world:verdicts", dataset_config="prompts")
