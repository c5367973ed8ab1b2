"""configs/recipes: each config is dry-run on a tiny model of its architecture and on rows of its data's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.load import load_config

RECIPES = Path(__file__).parent.parent / "configs" / "recipes"
ARCHITECTURES = {"pythia-1b-tldr": "gpt_neox", "smollm2-135m": "llama", "qwen2.5-0.5b": "qwen2", "zephyr-7b": "mistral"}
STAGES = {"sft": "sft", "reward": "train-rm", "ppo": "ppo", "dpo": "dpo"}
CONFIGS = sorted(path for path in RECIPES.glob("*/*.yaml") if path.stem in STAGES)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
ROWS = {
    ("pythia-1b-tldr", "sft"): {"prompt": "POST: q TL;DR:", "completion": " a"},
    ("pythia-1b-tldr", "pair"): {"prompt": "POST: q TL;DR:", "chosen": " a", "rejected": " b"},
    ("chat", "sft"): {"messages": [USER, GOOD]},
    ("chat", "pair"): {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """A tiny policy of each architecture, and a tiny reward model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_pipeline.data.tokenizers import train_byte_level_bpe

    folder, made = tmp_path_factory.mktemp("models"), {}
    tokenizer = train_byte_level_bpe(["a post and its summary"] * 9, 300)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for architecture in ARCHITECTURES.values():
        for scorer in (False, True):
            torch.manual_seed(0)
            labels = {"num_labels": 1} if scorer else {}
            config = AutoConfig.for_model(
                architecture, vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes, **labels
            )
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
            kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
            path = folder / f"{architecture}-{scorer}"
            kind.from_config(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[architecture, scorer] = path
    return made


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_dry_run(path, models, tmp_path, capsys):
    name, stage = path.parent.name, STAGES[path.stem]
    config = load_config(stage, path).config
    kind = "sft" if stage == "sft" else "pair"
    row = ROWS.get((name, kind)) or ROWS["chat", kind]
    data = tmp_path / "rows.jsonl"
    splits = (config.dataset_train_split, config.dataset_test_split)
    # Two prompts: a source's own splits may not share one.
    lines = [json.dumps(row | {"split": split}).replace("q", f"q{split}") for split in splits]
    data.write_text("\n".join(lines), encoding="utf-8")
    changes = [f"model_name_or_path={models[ARCHITECTURES[name], False]}", f"dataset_name={data}"]
    if stage != "ppo":
        changes.append("max_steps=2")  # one row would be one step, which a warm-up leaves without a learning rate
    else:
        changes.append(f"reward_model_path={models[ARCHITECTURES[name], True]}")
    code = main(["--home", str(tmp_path / "home"), stage, "--config", str(path), "--dry-run", "--json", *changes])
    plan = json.loads(capsys.readouterr().out)
    assert code == 0, plan
    assert plan["stage"] == stage and plan["output_name"] == config.output_name
    assert plan.get("rows", plan.get("prompts")) == 1
