"""Render records as texts for the tokenizer; messages go through its chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_pipeline.data.records import Record, Text, messages, plain
from rlhf_pipeline.errors import DataError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """A record as text. A text record has an empty prompt."""

    prompt: str
    completions: tuple[str, ...]
    templated: bool  # rendered by a chat template, which writes BOS itself

    def texts(self) -> list[str]:
        """Return the texts to tokenise: the prompt, and the prompt with each completion."""
        return [self.prompt, *(self.prompt + completion for completion in self.completions)]


def as_plain(record: Record) -> Rendered:
    """Return the record as text, without a chat template."""
    return Rendered(plain(record.prompt or ""), tuple(map(plain, record.completions)), False)


def render(record: Record, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Return the record as text.

    Raises:
        DataError: the record has messages but the tokenizer has no chat template, or the template refuses them.
    """
    if not record.conversational:
        return as_plain(record)
    if not getattr(tokenizer, "chat_template", None):
        found = "messages, and the tokenizer has no chat template"
        expected = "plain text, or a tokenizer with `chat_template`"
        fix = "use a chat model's tokenizer, or give the data as text"
        raise DataError(Fault(record.where, found, expected, fix))
    from trl.data_utils import apply_chat_template

    try:
        return _templated(record, tokenizer, apply_chat_template)
    except Exception as error:  # a template is a program and may raise any error
        raise DataError(Fault(record.where, f"the chat template refuses these messages: {error}")) from error


def _templated(record: Record, tokenizer: PreTrainedTokenizerBase, apply: Callable[..., dict[str, str]]) -> Rendered:
    if record.prompt is None:
        text = apply({"messages": _plain_list(record.completions[0])}, tokenizer)["text"]
        return Rendered("", (_closed(text, record.ended[0], tokenizer.eos_token),), True)
    prompt = _plain_list(record.prompt)
    if not record.completions:
        return Rendered(apply({"prompt": prompt}, tokenizer)["prompt"], (), True)
    parts = [
        apply({"prompt": prompt, "completion": _plain_list(completion)}, tokenizer) for completion in record.completions
    ]
    # A template may render the prompt differently before different completions; the common part is the prompt.
    shared = min((part["prompt"] for part in parts), key=len)
    completions = tuple(
        _closed((part["prompt"] + part["completion"])[len(shared) :], ended, tokenizer.eos_token)
        for part, ended in zip(parts, record.ended)
    )
    return Rendered(shared, completions, True)


def _closed(text: str, ended: bool, eos: str) -> str:
    """Remove the text after a template's EOS, and also the EOS if the response did not end."""
    stripped = text.rstrip()
    if not stripped.endswith(eos):
        return text
    return stripped if ended else stripped.removesuffix(eos)


def _plain_list(text: Text) -> list[dict[str, str]]:
    return [dict(message) for message in messages(text)]
