"""Render records as texts for the tokenizer; messages go through its chat template."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rlhf_pipeline.data.marks import control_tokens
from rlhf_pipeline.data.records import Messages, Record, messages, plain, shared_length
from rlhf_pipeline.errors import DataError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITTEN = "prompt_rewritten_by_template"
REASONING = "reasoning_removed_by_template"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class TemplateRefusal(Exception):
    """A chat template does not accept a record's messages."""


@dataclass(frozen=True)
class Rendered:
    """A record as text. A text record has an empty prompt."""

    prompt: str
    completions: tuple[str, ...]
    templated: bool  # rendered by a chat template, which writes BOS itself
    replies: tuple[tuple[int, int], ...] = ()  # characters (start, end) of the assistant's turns in the prompt
    notes: tuple[tuple[str, ...], ...] = ()  # what the chat template did to each completion: REASONING, REWRITTEN

    def texts(self) -> list[str]:
        """Return the texts to tokenise: the prompt, and the prompt with each completion."""
        return [self.prompt, *(self.prompt + completion for completion in self.completions)]


def as_plain(record: Record) -> Rendered:
    """Return the record as text, without a chat template."""
    return Rendered(plain(record.prompt or ""), tuple(map(plain, record.completions)), False)


def render(record: Record, tokenizer: PreTrainedTokenizerBase, *, replies: bool = False) -> Rendered:
    """Return the record as text.

    The prompt is rendered alone, as for sampling. A completion is the text behind it in the whole conversation.

    Args:
        replies: also find the assistant's turns in the prompt of a conversation.

    Raises:
        TemplateRefusal: the chat template does not accept the messages.
        DataError: the record has messages but the tokenizer has no chat template, or none that can be compiled.
    """
    if not record.conversational:
        rendered = as_plain(record)
        ends = zip(rendered.completions, record.ended)
        closed = tuple(_closed(text, ended, tokenizer.eos_token) for text, ended in ends)
        return Rendered(rendered.prompt, closed, False)
    if not getattr(tokenizer, "chat_template", None):
        found = "messages, and the tokenizer has no chat template"
        expected = "plain text, or a tokenizer with a chat template"
        fix = "set `chat_template: chatml` (or another of docs/data.md), or use a chat model's tokenizer"
        raise DataError(Fault(record.where, found, expected, fix))
    try:
        return _templated(record, tokenizer, replies)
    except Exception as error:  # a template is a program and may raise any error
        if type(error).__name__ == "TemplateSyntaxError":
            found = f"the chat template is not Jinja: {error}"
            raise DataError(Fault("chat_template", found, "a template that transformers can compile")) from error
        raise TemplateRefusal(str(error) or type(error).__name__) from error


def _templated(record: Record, tokenizer: PreTrainedTokenizerBase, replies: bool) -> Rendered:
    def closed(text: str, ended: bool) -> str:
        return _closed(text, ended, tokenizer.eos_token)

    if record.prompt is None:
        text = _apply(tokenizer, messages(record.completions[0]), record.extra)
        return Rendered("", (closed(text, record.ended[0]),), True)
    turns = messages(record.prompt)
    continued = turns[-1]["role"] == "assistant" and not record.turns
    how = {"continue_final_message": True} if continued else {"add_generation_prompt": True}
    prompt = _apply(tokenizer, turns, record.extra, **how)
    completions, notes = [], []
    for completion, ended in zip(record.completions, record.ended):
        reply = messages(completion)
        if continued and reply[0]["role"] == "assistant":  # one turn: its beginning is in the prompt
            begun = {**turns[-1], **reply[0], "content": turns[-1]["content"] + reply[0]["content"]}
            text = _apply(tokenizer, (*turns[:-1], begun, *reply[1:]), record.extra)
        else:
            text = _apply(tokenizer, (*turns, *reply), record.extra)
        border = shared_length(prompt, text)
        changed = {REASONING: any(part not in text for part in _reasoning(reply)), REWRITTEN: border < len(prompt)}
        notes.append(tuple(reason for reason, is_so in changed.items() if is_so))
        completions.append(closed(text[border:], ended))
    spans: tuple[tuple[int, int], ...] = ()
    if replies:
        marks = control_tokens(tokenizer)
        found = _replies(tokenizer, turns, prompt, record.extra)
        spans = tuple((start, start + _to_last_mark(prompt[start:end], marks)) for start, end in found)
    return Rendered(prompt, tuple(completions), True, spans, tuple(notes))


def _apply(tokenizer: PreTrainedTokenizerBase, turns: Messages, values: Mapping[str, Any], **how: Any) -> str:
    """Return messages as text, with a record's own `tools` and `chat_template_kwargs`."""
    options = values.get("chat_template_kwargs") or {}
    tools = values.get("tools") or None  # some templates write a heading for an empty list
    text = tokenizer.apply_chat_template([*map(dict, turns)], tools=tools, tokenize=False, **how, **options)
    return cast(str, text)


def _reasoning(turns: Messages) -> Iterator[str]:
    """Yield the reasoning in messages: what stands between <think> marks, or in a field of its own."""
    for turn in turns:
        own = turn.get("reasoning_content") or turn.get("thinking") or turn.get("reasoning")
        for part in [*_THINKING.findall(turn["content"]), *([own] if isinstance(own, str) else [])]:
            if part.strip():
                yield part.strip()


def _replies(
    tokenizer: PreTrainedTokenizerBase, turns: Messages, prompt: str, values: Mapping[str, Any]
) -> Iterator[tuple[int, int]]:
    """Yield the characters (start, end) of each assistant's turn in a rendered prompt.

    A template with generation marks says them itself. Else a turn starts where the prompt of the messages before it
    ends, and it ends where the messages up to it end. A template that writes a last turn otherwise than an earlier one
    (without its reasoning) is followed as far as both agree: behind the turn's content.
    """
    template = tokenizer.get_chat_template(None, values.get("tools") or None)
    if _GENERATION.search(template):
        yield from _marked(tokenizer, template, turns, values)
        return
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start = shared_length(_apply(tokenizer, turns[:number], values, add_generation_prompt=True), prompt)
        until = _apply(tokenizer, turns[: number + 1], values)
        if prompt.startswith(until):
            yield start, len(until)
            continue
        said = turn["content"].rpartition("</think>")[2].strip()
        place, own = prompt.find(said, start), until.rfind(said)
        if not said or place < 0 or own < 0:
            raise ValueError(f"turn {number + 1} of the assistant cannot be found in the rendered text")
        ending = until[own + len(said) :]
        yield start, place + len(said) + shared_length(ending, prompt[place + len(said) :])


def _marked(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: Messages, values: Mapping[str, Any]
) -> Sequence[tuple[int, int]]:
    """Return the characters that a template puts between generation marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options = tokenizer.special_tokens_map | (values.get("chat_template_kwargs") or {})
    marked: Any = render_jinja_template(
        conversations=[[*map(dict, turns)]],
        tools=values.get("tools") or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
        **options,
    )
    return marked[1][0]


def _to_last_mark(text: str, marks: Collection[str]) -> int:
    """Return the length of a turn up to its last control token, if no word follows; else its whole length."""
    end = max((text.rfind(mark) + len(mark) for mark in marks if mark in text), default=len(text))
    return len(text) if re.search(r"\w", text[end:]) else end


def _closed(text: str, ended: bool, eos: str) -> str:
    """Remove the text after a final EOS, and also the EOS if the response did not end."""
    stripped = text.rstrip()
    if not stripped.endswith(eos):
        return text
    return stripped if ended else stripped.removesuffix(eos)
