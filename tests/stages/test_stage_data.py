"""The examples of a config with fractions, whole splits, held-out rows and chats made of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.stages.data import StageData

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def tokenizer():
    made = train_byte_level_bpe(["a question and an answer"] * 9, 300)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def data(tmp_path: Path):
    """Make the data of an sft config whose rows are in files."""

    def run(files: dict[str, list[dict]], **changes) -> StageData:
        for name, rows in files.items():
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        values = {"model_name_or_path": "m", "output_name": "n", "max_prompt_length": 60, "response_length": 20}
        text = json.dumps(values | changes)
        for name in files:
            text = text.replace(f'"{name}"', json.dumps(str(tmp_path / name)))
        config = load_config("sft", None, extra=json.loads(text)).config
        return StageData(config, tmp_path, lambda _: None)

    return run


def rows(prompts: range, **more) -> list[dict]:
    return [{"prompt": f"q{n}", "completion": end, **more} for n in prompts for end in ("a", "b")]


def texts(examples) -> set[str]:
    return {example.prompt_text for example in examples}


def test_held_out_rows_share_no_prompt_with_those_trained_on(data, tokenizer):
    source = {"dataset_name": "rows.jsonl", "split": "all", "fraction": 0.5}
    made = data({"rows.jsonl": rows(range(20))}, datasets=[source], test_split_size=4)
    train, _ = made.split("demonstration", "train", tokenizer)
    held, _ = made.split("demonstration", "test", tokenizer)
    assert len(train) + len(held) == 20 and len(held) >= 4 and not texts(train) & texts(held)
    assert len(made.split("demonstration", "train", tokenizer, limit=3)[0]) == 3


def test_held_out_rows_of_one_source(data, tokenizer):
    made = data(
        {"rows.jsonl": rows(range(20))}, dataset_name="rows.jsonl", dataset_train_split="all", test_split_size=0.25
    )
    train, _ = made.split("demonstration", "all", tokenizer)
    held, _ = made.split("demonstration", "test", tokenizer)
    assert (len(train), len(held)) == (30, 10) and not texts(train) & texts(held)


def test_a_fraction_is_of_the_training_rows(data, tokenizer):
    files = {
        f"{name}.jsonl": rows(range(8), split="train") + rows(range(10 + 4 * n, 14 + 4 * n), split="test")
        for n, name in enumerate("ab")
    }
    made = data(files, dataset_mixer={"a.jsonl": 0.5, "b.jsonl": 0.25})
    assert len(made.split("demonstration", "train", tokenizer)[0]) == 8 + 4
    assert len(made.split("demonstration", "test", tokenizer)[0]) == 8 + 8


def test_text_as_chat_is_the_chat_template(data, tokenizer):
    made = data({"rows.jsonl": rows(range(1))}, dataset_name="rows.jsonl", text_as_chat=True, dataset_train_split="all")
    examples, _ = made.split("demonstration", "all", tokenizer)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q0"}], add_generation_prompt=True, return_dict=False
    )
    assert list(examples[0].prompt_ids) == expected
