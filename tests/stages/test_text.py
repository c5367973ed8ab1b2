"""From plain text to a preference-tuned model: pretraining with its own tokenizer, then SFT, reward model and DPO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.stages.data import StageData

NOUNS = ("river", "garden", "window", "letter", "engine")
WIDE = {"max_prompt_length": 40, "response_length": 24, "dataset_train_split": "all", "dataset_test_split": "all"}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
CHAT += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain_pairs():
    return [
        {"prompt": f"Say something of the {noun} {i}.", "chosen": f" A kind {noun}.", "rejected": f" No {noun}."}
        for i in range(4)
        for noun in NOUNS
    ]


def conversational_pairs():
    def turn(role, text):
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"].strip()),
            "rejected": turn("assistant", row["rejected"].strip()),
        }
        for row in plain_pairs()
    ]


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory):
    """A laboratory with `base`, pretrained on 60 lines, and with `base`'s tokenizer given a chat template."""
    folder = tmp_path_factory.mktemp("text")
    lab = tiny.copy(folder / "home")
    lines = [
        {"text": f"The {noun} was kind to the {other}. {i}"} for i in range(3) for noun in NOUNS for other in NOUNS
    ]
    llama = tiny.registry.resolve("sft").manifest.config["model_init"]
    result = lab.run(
        "sft",
        output_name="base",
        model_name_or_path=None,
        model_init={**llama, "max_position_embeddings": 64},
        tokenizer_init={"type": "byte_level_bpe", "vocab_size": 300},
        dataset_name=write(folder / "lines.jsonl", lines),
        completion_only_loss=False,
        max_steps=12,
        **WIDE,
    )
    from rlhf_pipeline.data.tokenizers import load_tokenizer
    from rlhf_pipeline.models.loading import load_causal_lm, save_model

    tokenizer = load_tokenizer(result.path)
    tokenizer.chat_template = CHAT
    save_model(load_causal_lm(result.path), tokenizer, folder / "chat")
    return lab, folder, result


def test_pretraining_makes_a_tokenizer_and_learns(text):
    lab, _, result = text
    rows = lab.rows(result.run)
    assert rows[-1]["loss/nll"] < rows[0]["loss/nll"]
    tokenizer = tokenizer_of(lab.registry.resolve("base"))
    assert len(tokenizer) <= 300
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    sentence = "The river was kind to the window. Ünïcode too"
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    assert result.metrics["train_examples"] == 75


def test_the_tokenizer_depends_on_the_texts_alone(text):
    lab, folder, result = text
    manifest = lab.registry.resolve("base").manifest
    again = lab.run(
        "sft",
        **{
            **WIDE,
            "output_name": "again",
            "model_name_or_path": None,
            "model_init": manifest.config["model_init"],
            "tokenizer_init": manifest.config["tokenizer_init"],
            "dataset_name": str(folder / "lines.jsonl"),
            "completion_only_loss": False,
            "max_steps": 12,
        },
    )
    assert lab.registry.resolve("again").manifest.tokenizer_digest == manifest.tokenizer_digest
    ours, theirs = lab.weights(result.model), lab.weights(again.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["plain", "conversational"])
def test_sft_reward_and_dpo_on_pairs(text, form, tmp_path):
    lab, folder, _ = text
    base = "base" if form == "plain" else str(folder / "chat")
    rows = plain_pairs() if form == "plain" else conversational_pairs()
    source = write(tmp_path / "pairs.jsonl", rows)
    options = {**WIDE, "dataset_name": source, "max_steps": 5}
    sft = lab.run("sft", output_name=f"sft-{form}", model_name_or_path=base, **options)
    assert sft.metrics["train_examples"] == 20
    reward = lab.run(
        "train-rm", output_name=f"rm-{form}", model_name_or_path=sft.model, reward_centering_samples=8, **options
    )
    dpo = lab.run("dpo", output_name=f"dpo-{form}", model_name_or_path=sft.model, **options)
    first = lab.rows(dpo.run)[0]
    assert first["loss/dpo"] == pytest.approx(0.693147, abs=1e-5)
    assert reward.metrics["train_pairs"] == dpo.metrics["train_pairs"] == 20
    # Nobody says P(label) here, so the labels have no known ceiling.
    assert "bayes_accuracy" not in reward.metrics
    ppo = lab.run(
        "ppo",
        output_name=f"ppo-{form}",
        model_name_or_path=sft.model,
        reward_model_path=reward.model,
        **{**options, "max_steps": 1, "max_prompt_length": 40, "response_length": 6},
    )
    assert ppo.metrics["prompts"] == 20
    assert lab.rows(ppo.run)[0]["objective/kl"] == 0


def test_the_chat_template_goes_with_the_model_and_ends_responses(text, tmp_path):
    lab, folder, _ = text
    source = write(tmp_path / "pairs.jsonl", conversational_pairs())
    config = lab.config("dpo", model_name_or_path=str(folder / "chat"), **{**WIDE, "dataset_name": source})
    tokenizer = tokenizer_of(lab.registry.resolve(str(folder / "chat")))
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "all", tokenizer)
    for example in examples:
        assert tokenizer.decode(example.prompt_ids).endswith("<assistant>")
        for ids in example.completions:
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
    result = lab.run(
        "sft", output_name="chatty", model_name_or_path=str(folder / "chat"), max_steps=1, **WIDE, dataset_name=source
    )
    assert tokenizer_of(lab.registry.resolve(result.model)).chat_template == CHAT
    assert lab.registry.resolve(result.model).manifest.chat_template_digest is not None


def test_completion_only_loss_leaves_prompts_alone(text, tmp_path):
    """With the loss on completions the prompt's tokens are no part of the denominator; on the whole, they are."""
    lab, _, _ = text
    source = write(tmp_path / "pairs.jsonl", plain_pairs())
    config = lab.config("sft", model_name_or_path="base", **{**WIDE, "dataset_name": source})
    tokenizer = tokenizer_of(lab.registry.resolve("base"))
    examples, _ = StageData(config, lab.home, lambda _: None).split("demonstration", "all", tokenizer)
    from rlhf_pipeline.data.tokenize import whole_sequence
    from rlhf_pipeline.training.windows import counts_of

    example = examples[0]
    assert counts_of([example])["tokens"] == len(example.completions[0])
    whole = counts_of([whole_sequence(example)])
    assert whole["tokens"] == len(example.prompt_ids) + len(example.completions[0]) - 1
    only, all_ = (
        lab.run(
            "sft",
            output_name=f"loss-{flag}",
            model_name_or_path="base",
            completion_only_loss=flag,
            max_steps=1,
            **{**WIDE, "dataset_name": source},
        )
        for flag in (True, False)
    )
    assert lab.rows(only.run)[0]["loss/nll"] != lab.rows(all_.run)[0]["loss/nll"]


def test_the_first_sft_loss_is_the_mean_over_completion_tokens(text, tmp_path):
    lab, _, _ = text
    source = write(tmp_path / "pairs.jsonl", plain_pairs())
    options = {**WIDE, "dataset_name": source, "per_device_train_batch_size": 20, "max_steps": 1}
    config = lab.config("sft", model_name_or_path="base", **options)
    resolved = lab.registry.resolve("base")
    tokenizer = tokenizer_of(resolved)
    examples, _ = StageData(config, lab.home, lambda _: None).split("demonstration", "all", tokenizer)
    from rlhf_pipeline.models.loading import load_causal_lm

    model = load_causal_lm(resolved.path)
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.completions[0]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        start = len(example.prompt_ids) - 1
        total -= float(logprobs[start:].gather(1, ids[0, start + 1 :, None]).sum())
        tokens += len(example.completions[0])
    result = lab.run("sft", output_name="first", model_name_or_path="base", **options)
    assert lab.rows(result.run)[0]["loss/nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert result.cost["tokens_trained"] >= tokens
