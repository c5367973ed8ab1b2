"""Files to read, and a tokenizer small enough to know its ids by heart."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from rlhf_pipeline.data.records import Record

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}a{{ m.content }}{% else %}d{{ m.content }}<eos>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}d{% endif %}"
)


@pytest.fixture
def jsonl(tmp_path):
    """Write rows as JSON lines, gzipped where the name says so, and return the path as text."""

    def write(*rows: dict | str, name: str = "rows.jsonl") -> str:
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
        content = text.encode("utf-8", errors="surrogateescape")
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


@pytest.fixture
def letters():
    """Tokenizer of <eos> 0, <pad> 1, a 2, b 3, c 4, d 5, newline 6, and the merged bc 7."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "a", "b", "c", "d", "\n", "bc"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def chat(letters):
    """The same with a chat template: `a` before a user's turn, `d` before an assistant's, <eos> after it."""
    letters.chat_template = CHAT_TEMPLATE
    return letters


@pytest.fixture
def pair():
    """Make a pair record."""

    def make(prompt="a", chosen="b", rejected="c", ended=(True, True), **fields) -> Record:
        return Record("pair", prompt, (chosen, rejected), ended, **fields)

    return make


@pytest.fixture(scope="session")
def hh_file() -> str:
    """The HH-RLHF file of 2,312 rows, which is not part of the project."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folders = [Path(os.environ["RLHF_TEST_DATA"])] if "RLHF_TEST_DATA" in os.environ else [beside]
    for folder in folders:
        if (folder / "hh_harmless_test.jsonl.gz").is_file():
            return str(folder / "hh_harmless_test.jsonl.gz")
    pytest.skip("hh_harmless_test.jsonl.gz is neither in $RLHF_TEST_DATA nor in ../shared/data")
