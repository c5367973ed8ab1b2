"""Records: the common form of the rows of all sources."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any

Messages = tuple[dict[str, str], ...]
Text = str | Messages

TEMPLATE_VALUES: dict[str, type] = {"tools": list, "chat_template_kwargs": dict}
"""Columns beside messages that the chat template reads, and the type of their values."""

_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Record:
    """One row of a source: a prompt and its completions, as text or messages, with token ids if known.

    A `text` has no prompt and one completion; a `prompt` has no completion; a `demonstration` has one completion, and
    so has a `labelled`, which says whether it is good; a `pair` has two, the preferred one first; a `ranking` has two
    or more, in the order of the row.
    """

    kind: str
    prompt: Text | None
    completions: tuple[Text, ...] = ()
    ended: tuple[bool, ...] = ()  # per completion; false: it was cut and gets no EOS
    where: str = ""  # file:line, for messages
    split: str | None = None  # the split in the source
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[tuple[int, ...], ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # ranks, scores, label_probability, margin, label, ...
    instruction: tuple[str, str] | None = None  # instruction and input of an Alpaca row, which the prompt is made of
    turns: bool = False  # the last turn of a conversation, whose earlier assistant's turns may be trained too
    columns: Mapping[str, Any] = field(default_factory=dict)  # what the format does not read, for reward functions

    @property
    def conversational(self) -> bool:
        """Whether prompt and completions are messages, which need a chat template."""
        texts = self.completions if self.prompt is None else (self.prompt, *self.completions)
        return any(not isinstance(text, str) for text in texts)

    @property
    def key(self) -> str:
        """The text that identifies the prompt, NFC-normalised and stripped; for a text record, its text."""
        if self.prompt is None and self.completions:
            return normalise(plain(self.completions[0]))
        if not self.prompt and self.prompt_ids is not None:
            return "ids " + " ".join(map(str, self.prompt_ids))
        return normalise(plain(self.prompt or ""))

    @property
    def prompt_key(self) -> str:
        """SHA-256 of `key`: two records have the same one if and only if they have the same prompt."""
        return _hash(self.key)

    def canonical(self) -> str:
        """Return the content as one line of JSON, without its origin; digests use it."""
        content = {
            "kind": self.kind,
            "prompt": self.prompt,
            "completions": self.completions,
            "ended": self.ended,
            "prompt_ids": self.prompt_ids,
            "completion_ids": self.completion_ids,
            "extra": dict(self.extra),
        }
        return _encode(content)


@lru_cache(maxsize=4096)
def _hash(text: str) -> str:
    """Return the SHA-256 of a text; cached, because rows of one prompt often follow one another."""
    return sha256(text.encode()).hexdigest()


def plain(text: Text) -> str:
    """Return a text unchanged, and messages as `role: content` paragraphs."""
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def messages(text: Text | None) -> Messages:
    """Return a text that is known to be messages."""
    assert text is not None and not isinstance(text, str)
    return text


def normalise(text: str) -> str:
    """Return `text` in Unicode NFC, stripped."""
    return unicodedata.normalize("NFC", text).strip()


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the common beginning of two texts or lists."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high:  # halved, so that texts of megabytes are compared as fast as they are copied
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low
