"""Responses as texts and messages: what reward functions, judges and foreign reward models read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.data.records import Messages, Text, plain
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """One response to a prompt, as text.

    prompt: text, or for a chat its turns, without an assistant's turn that the response continues. response: the text
    without the token that ended it; it includes the assistant's turn that it continues. columns: those of the row.
    """

    prompt: Text
    response: str
    ids: list[int]
    ended: bool
    columns: Mapping[str, Any]

    @property
    def turns(self) -> Messages:
        """The prompt as messages: a text is a user's turn."""
        return ({"role": "user", "content": self.prompt},) if isinstance(self.prompt, str) else self.prompt

    @property
    def reply(self) -> Messages:
        """The response as an assistant's message."""
        return ({"role": "assistant", "content": self.response},)


def as_text(prompt: Text) -> str:
    """A prompt as text: the content of a single turn, else `role: content` paragraphs."""
    return prompt[0]["content"] if not isinstance(prompt, str) and len(prompt) == 1 else plain(prompt)


def answers(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, rereading: bool = False
) -> Iterator[Answer]:
    """Decode every response of some examples, in their order.

    Args:
        rereading: the text is for another tokenizer. Control tokens are left out, and a space by which the response
            continues the prompt is kept (tokenizers without byte level drop it from a response decoded alone).
    """
    for example in examples:
        prompt: Text = example.prompt_text or text_of(tokenizer, example.prompt_ids)
        opening, before = "", text_of(tokenizer, example.prompt_ids, skip_special_tokens=True) if rereading else ""
        if example.messages is not None:
            prompt = example.messages
            if prompt[-1]["role"] == "assistant":
                opening, prompt = prompt[-1]["content"], prompt[:-1]
        for ids, ended in zip(example.completions, example.ended, strict=True):
            shown = ids[:-1] if ended else ids
            text = text_of(tokenizer, shown, skip_special_tokens=rereading)
            if rereading and shown:
                whole = text_of(tokenizer, [*example.prompt_ids, *shown], skip_special_tokens=True)
                text = whole[len(before) :] if whole.startswith(before) else text
            yield Answer(prompt, opening + text, list(ids), bool(ended), example.columns)
