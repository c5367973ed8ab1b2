"""Reward models with another tokenizer, in every command that scores responses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.run import run_compare
from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.errors import ConfigError, MismatchError
from rlhf_pipeline.experiment.estimate import estimate_stage

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PROMPT = "the plot of this drama was"


def save(folder: Path, *, template: str | None = None, labels: int = 1, **changes) -> str:
    """A classifier with a tokenizer of its own, without PAD, and with weights far from 0."""
    tokenizer = train_byte_level_bpe(["the plot of this drama was very great and not slow"] * 4, 280)
    tokenizer.pad_token, tokenizer.chat_template = None, template
    torch.manual_seed(1)
    values = {**SIZES, "vocab_size": len(tokenizer), "num_labels": labels, "pad_token_id": None, **changes}
    model = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model("llama", **values)
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_score(folder: str, text: str) -> float:
    """transformers' score of a text, as a user would compute it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits.item()


@pytest.fixture
def foreign(tmp_path):
    return save(tmp_path / "foreign")


def text_of(row: dict, side: str) -> str:
    """Prompt and response as one text, without the world's control token, with the reward model's EOS."""
    words = [word for word in f"{row['prompt']} {row[side]}".split() if word != "<pad>"]
    return " ".join(words) + "<|endoftext|>" * row[f"{side}_ended"]


def collected(result):
    return [json.loads(line) for line in (Path(result.path) / "records.jsonl").read_text().splitlines()]


def log_of(result):
    return (Path(result.run) / "log.txt").read_text()


def test_collect_stores_the_scores_of_plain_transformers(lab, foreign):
    result = lab.run("collect", judge=foreign, num=30, labels="rank")
    rows = collected(result)
    assert rows
    for row in rows:
        for side in ("chosen", "rejected"):
            expected = plain_score(foreign, text_of(row, side))
            assert row[f"{side}_score"] == pytest.approx(expected, abs=1e-5)
    assert lab.registry.resolve_data("collected").manifest.parents["judge"].ref == foreign


def zero(prompts, **_):
    return [0.0] * len(prompts)


def test_ppo_trains_on_it_and_counts_its_cost(lab, foreign, function):
    result = lab.run("ppo", reward_model_path=foreign, value_init="sft", max_steps=2)
    assert "reads decoded responses, tokenised by its own tokenizer as text after the prompt" in log_of(result)
    manifest = lab.registry.resolve(result.model).manifest
    assert manifest.parents["reward_model"].ref == foreign
    assert all(abs(row["objective/scores"]) > 1e-3 for row in lab.rows(result.run))

    free = lab.run("ppo", output_name="free", reward_model_path=None, reward_functions=function(zero), max_steps=1)
    paid = lab.run("ppo", output_name="paid", reward_model_path=foreign, value_init="sft", max_steps=1)
    assert paid.cost["flops"] > free.cost["flops"]


def test_it_judges_a_run(lab, foreign):
    result = lab.run("ppo", judge=foreign, max_steps=1)
    assert "objective/judge" in lab.rows(result.run)[0] and result.cost["judge_flops"] > 0


def test_evaluate_and_compare_score_with_it(lab, foreign, undrawn, capsys):
    command = ["evaluate", "sft", "--home", str(lab.home), "--json", "--max-prompts", "4", "--samples", "2"]
    assert main([*command, "--reward-model", foreign, "--judge", foreign, "reward_tokenization=text"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["score"]["mean"] == pytest.approx(found["judge"]["mean"], abs=1e-6) and abs(found["score"]["mean"]) > 0
    ppo = lab.run("ppo", reward_model_path=foreign, value_init="sft", max_steps=1)
    dpo = lab.run("dpo", max_steps=1)  # its held-out pairs are scored too
    options = {"max_prompts": 8, "samples": 2, "allow_mismatch": True}
    config = lab.config("compare", arms=[ppo.model, dpo.model], baseline="sft", **options)
    results = run_compare(config, lab.home, quiet=True)
    assert results.reward_model == foreign and results.rows[1].scored_by == foreign
    assert foreign in results.preferences.scorers


def test_a_chat_template_of_its_own_is_used(lab, tmp_path):
    folder = save(tmp_path / "chat", template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    result = lab.run("collect", judge=folder, num=10, labels="rank")
    rows = collected(result)
    for row in rows:
        response = text_of(row | {"prompt": "", "chosen_ended": False}, "chosen")
        text = f"user: {row['prompt']}\nassistant: {response}\n"
        assert row["chosen_score"] == pytest.approx(plain_score(folder, text), abs=1e-5)
    plain = lab.run("collect", output_name="other", judge=folder, num=10, labels="rank", reward_tokenization="text")
    row = collected(plain)[0]
    assert row["chosen_score"] == pytest.approx(plain_score(folder, text_of(row, "chosen")), abs=1e-5)


def test_a_policy_is_measured_by_its_reward_model_as_it_was_trained(lab, tmp_path, capsys):
    """Trained on plain text: the template of the reward model is not used, unless the measurement asks for it."""
    folder = save(tmp_path / "chat", template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    how = {"reward_model_path": folder, "reward_tokenization": "text"}
    ppo = lab.run("ppo", **how, max_steps=1)
    command = ["evaluate", ppo.model, "--home", str(lab.home), "--json", "--max-prompts", "4", "--samples", "2"]

    def mean(*changes):
        assert main([*command, *changes]) == 0
        return json.loads(capsys.readouterr().out)["metrics"]["score"]["mean"]

    assert mean() == pytest.approx(mean("reward_tokenization=text"), abs=1e-6)
    assert mean() != pytest.approx(mean("reward_tokenization=chat"), abs=1e-3)


def test_a_dry_run_compares_it_with_the_tokenizer_that_the_config_makes(lab, tmp_path):
    """A reward model with the policy's tokenizer and a template of its own reads text, unless it is the policy's."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = tmp_path / "with template"
    shutil.copytree(lab.registry.resolve("reward").path, folder)
    (folder / "manifest.json").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    estimate_stage(lab.config("ppo", reward_model_path=str(folder), chat_template=template), lab.home)
    for own in (None, template + " "):
        with pytest.raises(ConfigError, match="reads the responses as text"):
            estimate_stage(lab.config("ppo", reward_model_path=str(folder), chat_template=own), lab.home)
    with pytest.raises(MismatchError, match="tokenizer"):
        estimate_stage(lab.config("ppo", eos_token="great"), lab.home)


def test_a_critic_cannot_start_from_it(lab, foreign):
    with pytest.raises(ConfigError) as error:
        lab.run("ppo", reward_model_path=foreign, max_steps=1)
    assert [(fault.where, fault.fix) for fault in error.value.faults] == [("value_init", "set value_init: sft")]
    with pytest.raises(ConfigError, match="value_init is reward_model, but with reward_tokenization text"):
        lab.config("ppo", reward_model_path=foreign, reward_tokenization="text", value_init="reward_model")
    assert lab.config("ppo", reward_model_path=foreign, reward_tokenization="text").value_init == "sft"


def test_a_model_of_the_registry_is_refused_unless_text_is_asked_for(lab, tmp_path):
    lab.registry.publish(
        "strange", "reward", lambda folder: save(folder) and None, config={}, config_digest="", parents={}, data=[]
    )
    with pytest.raises(MismatchError, match=r"strange@v1: found tokenizer .* or set reward_tokenization: text"):
        lab.run("collect", judge="strange", num=10)
    assert lab.run("collect", judge="strange", num=10, reward_tokenization="text").metrics["records"] > 0


def test_positions_limit_what_is_read_as_ids_and_cut_what_is_read_as_text(lab, tmp_path):
    short = save(tmp_path / "short", max_position_embeddings=5)
    assert lab.run("collect", judge=short, num=10).metrics["records"] > 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.registry.resolve("sft").path)
    tokenizer.save_pretrained(short)  # the policy's: it is read as ids
    with pytest.raises(ConfigError, match="positions"):
        lab.run("collect", judge=short, num=10)


def test_ids_are_asked_for(lab, foreign):
    with pytest.raises(MismatchError, match="found tokenizer"):
        lab.run("collect", judge=foreign, num=10, reward_tokenization="ids")


def test_chat_without_a_template_is_refused(lab, foreign):
    with pytest.raises(MismatchError, match="found no chat template"):
        lab.run("collect", judge=foreign, num=10, reward_tokenization="chat")


def test_our_own_reward_model_read_as_text_gives_its_own_scores(lab):
    """The built-in world's words are its tokens: text and ids are one input, and the shift is subtracted by both."""
    ids = lab.run("collect", output_name="ids", judge="reward", num=20, labels="rank")
    text = lab.run("collect", output_name="text", judge="reward", num=20, labels="rank", reward_tokenization="text")
    ours, theirs = collected(ids), collected(text)
    assert [row["chosen"] for row in ours] == [row["chosen"] for row in theirs]
    assert [row["chosen_score"] for row in ours] == pytest.approx([row["chosen_score"] for row in theirs], abs=1e-5)


def test_a_classifier_of_three_labels_is_refused(lab, tmp_path):
    with pytest.raises(MismatchError, match="a classifier with 3 labels"):
        lab.run("collect", judge=save(tmp_path / "three", labels=3), num=10)


def test_a_dry_run_finds_what_the_run_would_refuse(lab, foreign, tmp_path):
    def tried(**changes):
        with pytest.raises((ConfigError, MismatchError)) as error:
            estimate_stage(lab.config("ppo", **changes), lab.home)
        return str(error.value)

    assert "set value_init: sft" in tried(reward_model_path=foreign)
    assert "found tokenizer" in tried(reward_model_path=foreign, value_init="sft", reward_tokenization="ids")
    assert "no chat template" in tried(judge=foreign, reward_tokenization="chat")
    assert estimate_stage(lab.config("ppo", reward_model_path=foreign, value_init="sft"), lab.home)["updates"] == 4


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
CHAT += "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_function_of_trl_and_one_of_columns_train_a_chat_model(lab, tmp_path, function):
    """The whole way: rows of messages with a column, a policy with a chat template, TRL's own function beside ours."""
    tokenizer = train_byte_level_bpe(["two and two are four, three and three are six"] * 4, 280)
    tokenizer.chat_template = CHAT
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    config = transformers.AutoConfig.for_model("llama", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [
        {"prompt": [{"role": "user", "content": f"{n} and {n}?"}], "solution": str(2 * n), "note": None}
        for n in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    async def judge(prompts, completions, solution, **_):
        for prompt, completion, wanted in zip(prompts, completions, solution, strict=True):
            assert completion[0]["role"] == "assistant" and [turn["role"] for turn in prompt] == ["user"]
            seen.append((prompt[0]["content"], wanted))
        return [None if wanted == "0" else 1.0 for wanted in solution]

    result = lab.run(
        "ppo",
        model_name_or_path=str(tmp_path / "chat"),
        dataset_name=str(tmp_path / "rows.jsonl"),
        dataset_train_split="all",
        reward_model_path=None,
        reward_functions=["trl.rewards:think_format_reward", function(judge)],
        max_prompt_length=40,
        response_length=4,
        max_steps=1,
    )
    assert sorted(seen) == sorted((f"{n} and {n}?", str(2 * n)) for n in range(16))
    log = (lab.home / "runs" / result.run / "log.txt").read_text()
    assert "read by reward functions only: solution" in log and "not read" not in log
    # TRL's function gives 0 to every response: none has <think>. Ours gives 1, and None to one of sixteen.
    assert lab.rows(result.run)[0]["objective/scores"] == pytest.approx(15 / 16)
