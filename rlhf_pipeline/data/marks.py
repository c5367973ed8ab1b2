"""Find rows whose own text has control tokens or the marks of a chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.data.records import Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"<[|｜][^<>]{1,40}[|｜]>|</?[a-z]+_of_[a-z]+>|\[/?[A-Z_]{3,20}\]|<</?[A-Z]{2,10}>>")
"""The forms of marks that chat templates write without a special token."""


def marked_rows(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the rows whose text has a control token of the tokenizer or a mark of its chat template.

    Such text is encoded as the control token, whoever wrote it. The EOS at the end of a completion is none:
    the completion ends there.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    marks = {*_MARKS.findall(str(template)), *control_tokens(tokenizer)}
    if not marks:
        return []
    search = re.compile("|".join(map(re.escape, sorted(marks)))).search
    eos = str(tokenizer.eos_token)
    return [
        record.where
        for record in records
        if any(map(search, _texts(record.prompt)))
        or any(search(text.rstrip().removesuffix(eos)) for item in record.completions for text in _texts(item))
    ]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of the tokenizer's special tokens."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {token for token in (*added, *tokenizer.all_special_tokens) if token.strip()}


def _texts(text: Text | None) -> list[str]:
    if text is None or isinstance(text, str):
        return [text or ""]
    return [message["content"] for message in text]
