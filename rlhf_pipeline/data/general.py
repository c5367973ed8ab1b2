"""Read the columns of this project's own formats, and of formats that tools share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_pipeline.data import preferences
from rlhf_pipeline.data.columns import Schema, SourceRow, alike, alpaca_parts, alpaca_prompt
from rlhf_pipeline.data.records import Messages, Record

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _demonstration(row: SourceRow) -> Record | None:
    prompt, completion = row.prompt(), row.text("completion")
    if prompt is None or completion is None:
        return None
    ids = row.all_ids("prompt_ids", "completion_ids")
    prompt, (completion,) = alike(prompt, (completion,))
    row.completion("completion", completion, empty=ids is not None)
    row.check_prompt(prompt)
    prompt_ids, completion_ids = (ids[0], ids[1:]) if ids else (None, None)
    return Record("demonstration", prompt, (completion,), (row.flag("ended"),), "", None, prompt_ids, completion_ids)


def _messages(row: SourceRow) -> Record | None:
    messages = row.text("messages")
    if messages is None:
        return None
    if isinstance(messages, str):
        row.fault("wrong_type", "'messages' is text", "a list of messages")
        return None
    return _conversation(row, "messages", messages)


def _sharegpt(row: SourceRow) -> Record | None:
    turns = row.value("conversations")
    if turns is None:
        return None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        row.fault("wrong_type", "'conversations' is not a list of objects", "a list of from, value")
        return None
    messages = row.as_text("conversations", [_from_sharegpt(turn) for turn in turns])
    if messages is None or isinstance(messages, str):
        return None
    return _conversation(row, "conversations", messages)


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    if "from" not in turn or "value" not in turn:
        return turn
    role = turn["from"]
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": turn["value"]}


def _conversation(row: SourceRow, name: str, messages: Messages) -> Record | None:
    if row.completion(name, messages) is None:
        return None
    if len(messages) < 2:
        row.fault("empty_prompt", f"{name!r} has one turn only", "a user's turn and an assistant's")
        return None
    row.check_prompt(messages[:-1])
    prompt = row.with_system(messages[:-1])
    return Record("demonstration", prompt, (messages[-1:],), (row.flag("ended"),), turns=True)


def _sharegpt_pair(row: SourceRow) -> Record | None:
    turns = [*row.values["conversations"]] if isinstance(row.value("conversations"), list) else [None]
    sides = [row.value("chosen"), row.value("rejected")]
    if not all(isinstance(turn, dict) for turn in [*turns, *sides]):
        row.fault("wrong_type", "'conversations', 'chosen' and 'rejected' are not turns", "objects of from, value")
        return None
    read = [row.as_text("conversations", [_from_sharegpt(turn) for turn in part]) for part in (turns, *zip(sides))]
    prompt = None if read[0] is None else row.with_system(read[0])
    if prompt is None or read[1] is None or read[2] is None:
        return None
    return preferences.finish_pair(row, prompt, read[1], read[2])


def _alpaca(row: SourceRow) -> Record | None:
    prompt, output = alpaca_prompt(row), row.string("output")
    if prompt is None or output is None:
        return None
    prompt, (completion,) = alike(prompt, (output,))
    row.completion("output", completion)
    read = alpaca_parts(row) if isinstance(prompt, str) else None
    return Record("demonstration", prompt, (completion,), (row.flag("ended"),), instruction=read)


def _text(row: SourceRow) -> Record | None:
    text = row.string("text")
    if text is None:
        return None
    row.completion("text", text)
    return Record("text", None, (text,), (row.flag("ended"),))


def _prompt(row: SourceRow) -> Record | None:
    prompt = row.prompt()
    if prompt is None:
        return None
    row.check_prompt(prompt)
    ids = row.all_ids("prompt_ids")
    return Record("prompt", prompt, prompt_ids=ids[0] if ids else None)


_ENDED = ("ended", "prompt_ids", "completion_ids")
_SIDES = ("chosen_ended", "rejected_ended", "prompt_ids", "chosen_ids", "rejected_ids", "label_probability")
_SCORED = tuple(name for names in preferences.SCORES for name in names)
PAIR = Schema(("chosen", "rejected"), preferences.pair, "pair", ("prompt", "system", *_SIDES, *_SCORED))
IMPLICIT = replace(PAIR, read=preferences.implicit, label="pair, implicit prompt")
HH = Schema(PAIR.columns, preferences.hh, "pair, HH transcripts", (*_SIDES, *_SCORED))
SCHEMAS: list[Schema] = [
    Schema(("conversations", "chosen", "rejected"), _sharegpt_pair, "pair, ShareGPT", ("system", *_SIDES, *_SCORED)),
    PAIR,
    Schema(("prompt", "completions", "ranks"), preferences.ranking, "ranking", ("system", "scores", *_ENDED)),
    Schema(("prompt", "completions", "scores"), preferences.ranking, "ranking", ("system", *_ENDED)),
    Schema(("prompt", "completion"), _demonstration, "demonstration", ("system", *_ENDED)),
    Schema(("messages",), _messages, "demonstration, messages", ("system", "ended")),
    Schema(("instruction", "output"), _alpaca, "demonstration, Alpaca", ("input", "system", "history", "ended")),
    Schema(("conversations",), _sharegpt, "demonstration, ShareGPT", ("system", "ended")),
    Schema(("text",), _text, "text", ("ended",)),
    Schema(("prompt",), _prompt, "prompt", ("system", "prompt_ids")),
]
DEMONSTRATIONS = (_demonstration, _messages, _sharegpt, _alpaca)
"""What reads the formats of one completion, whose rows may have labels."""
