"""`make real` on a tiny stand-in for the pretrained model: the experiment on human pairs, as it is shipped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = [
    "please",
    "tell",
    "me",
    "how",
    "to",
    "bake",
    "a",
    "good",
    "cake",
    "without",
    "an",
    "oven",
    "and",
    "why",
    "it",
    "rises",
    "when",
    "it",
    "is",
    "warm",
]


def small_base(folder: Path, texts: list[str]) -> None:
    """A Llama of one layer with its tokenizer, in the folder where the experiments look for the pretrained model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_pipeline.data.tokenizers import train_byte_level_bpe

    tokenizer = train_byte_level_bpe(texts, 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def transcripts(count: int) -> list[dict[str, str]]:
    """Made-up pairs in HH's format: one question each, two replies."""
    chosen = random.Random(0)
    rows = []
    for number in range(count):
        question = f"\n\nHuman: question {number} " + " ".join(chosen.choices(WORDS, k=6)) + "\n\nAssistant:"
        replies = [question + " " + " ".join(chosen.choices(WORDS, k=chosen.randint(3, 6))) for _ in range(2)]
        rows.append({"chosen": replies[0], "rejected": replies[1]})
    return rows


@pytest.mark.check
def test_the_experiment_on_human_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_pipeline.experiment.run import run_experiment

    monkeypatch.chdir(tmp_path)
    rows = transcripts(150)
    Path("hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small_base(Path("build/smollm2"), [row["chosen"] for row in rows])
    stages = ("sft", "reward", "judge", "ppo", "dpo")
    changes = [f"{name}.{key}" for name in stages for key in ("dataset_name=hh.jsonl", "use_cpu=true")]
    changes += [f"{name}.max_steps=2" for name in stages]
    changes += ["compare.use_cpu=true", "compare.max_prompts=4"]
    result = run_experiment(
        ROOT / "configs" / "real" / "human" / "experiment.yaml", changes, tmp_path / "home", quiet=True
    )
    found = result["comparison"]
    assert set(found.arms) == {"ppo", "dpo"} and not found.comparable.differences
    assert {row.beta for row in found.rows if row.stage in ("ppo", "dpo")} == {0.1}
    assert (tmp_path / "home" / "reports" / "real-human" / "index.html").is_file()
