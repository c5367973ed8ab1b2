"""How the text of a row becomes a prompt: the words around an Alpaca instruction, and chats made of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_pipeline.data.records import Record, Text

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n"


@dataclass(frozen=True)
class Style:
    """The keys `instruction_style` and `text_as_chat` of a config."""

    instruction: str = "sections"
    chat: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Style:
        """Return the style of a config's values; those of earlier releases have none."""
        return cls(config.get("instruction_style") or "sections", bool(config.get("text_as_chat")))

    def apply(self, record: Record) -> Record:
        """Return a record with its prompt in this style; token ids of its source are kept only if nothing changes."""
        if record.instruction is not None:
            record = replace(record, prompt=instruction_prompt(self.instruction, *record.instruction))
        if not self.chat or record.prompt is None or record.conversational:
            return record
        return replace(
            record,
            prompt=_message("user", record.prompt),
            completions=tuple(_message("assistant", text) for text in record.completions),
            prompt_ids=None,
            completion_ids=None,
        )


PLAIN = Style()
"""Text as it is, and this package's own sections for Alpaca rows."""


def instruction_prompt(style: str, instruction: str, given: str) -> str:
    """Return the prompt of an Alpaca row: its instruction and its input, which may be empty.

    sections: `### Instruction:`, `### Input:` and `### Response:`; alpaca: the same after Alpaca's opening sentence
    (Taori et al. 2023); plain: both, on lines of their own.
    """
    has_input = bool(given.strip())
    if style == "plain":
        return f"{instruction}\n{given}" if has_input else instruction
    middle = f"### Input:\n{given}\n\n" if has_input else ""
    opening = f"{_TASK}{', paired with an input that provides further context' if has_input else ''}. {_REQUEST}"
    return f"{opening if style == 'alpaca' else ''}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _message(role: str, text: Text) -> Text:
    assert isinstance(text, str)  # `Record.conversational`
    return ({"role": role, "content": text},)
