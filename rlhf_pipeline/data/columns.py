"""Read the columns of one row; faults are collected, not raised."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.data.files import RowFault, Rows, row_fault
from rlhf_pipeline.data.records import Messages, Record, Text
from rlhf_pipeline.data.styles import instruction_prompt
from rlhf_pipeline.disk.decoding import lone_surrogate

IDENTICAL = "identical_pair"
TIED = "tied_pair"


class SourceRow:
    """One row of a source; its readers return None after recording a fault.

    Args:
        columns: those of the whole source that are not empty in every row.
    """

    def __init__(self, where: str, values: Mapping[str, Any], columns: Collection[str] = ()):
        self.where = where
        self.values = values
        self.columns = columns
        self.faults: list[RowFault] = []
        self.skipped: str | None = None  # why a valid row makes no record

    def fault(self, reason: str, found: str, expected: str = "", fix: str = "") -> None:
        """Record a fault of this row."""
        self.faults.append(row_fault(self.where, reason, found, expected, fix))

    def has(self, column: str) -> bool:
        """Whether the column exists and is not null."""
        return self.values.get(column) is not None

    def value(self, column: str) -> Any:
        """Read a required column."""
        if column not in self.values:
            there = ", ".join(sorted(map(str, self.values))) or "none"
            self.fault("missing_column", f"no column {column!r}, only {there}", f"a column {column!r}")
        elif self.values[column] is None:
            self.fault("null", f"{column!r} is null", "a value")
        return self.values.get(column)

    def text(self, column: str) -> Text | None:
        """Read a required column of text or messages."""
        value = self.values.get(column)
        if type(value) is str and value.isascii():  # the usual case, with nothing left to check
            return value
        value = self.value(column)
        return None if value is None else self.as_text(column, value)

    def prompt(self) -> Text | None:
        """Read the column `prompt`. A source with a column `system` has messages: its text is their system turn."""
        text = self.text("prompt")
        return None if text is None else self.with_system(text)

    def with_system(self, prompt: Text) -> Text | None:
        """Put the text of the column `system` before a prompt, if the source has this column."""
        if "system" not in self.columns:
            return prompt
        turns, system = _message("user", prompt), self.string("system") if self.has("system") else ""
        if not system or not system.strip():
            return None if system is None else turns
        if turns[0]["role"] != "system":
            return ({"role": "system", "content": system}, *turns)
        if turns[0]["content"].strip() != system.strip():
            self.fault("prompts_differ", "'system' is not the system turn of the messages", "one system turn")
        return turns

    def string(self, column: str) -> str | None:
        """Read a required column of plain text."""
        text = self.text(column)
        if text is None or isinstance(text, str):
            return text
        self.fault("wrong_type", f"{column!r} is a list", "text")
        return None

    def as_text(self, name: str, value: Any) -> Text | None:
        """Check that `value` is text or a list of messages."""
        if isinstance(value, str):
            return value if self._encodable(name, value) else None
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            return self._messages(name, value)
        self.fault("wrong_type", f"{name!r} is {_kind(value)}", "text or a list of messages")
        return None

    def _encodable(self, name: str, value: str) -> bool:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fault("not_utf8", f"{name!r} {lone_surrogate(value, error.start)}", "UTF-8")
            return False
        return True

    def plain_data(self, name: str, value: Any) -> bool:
        """Check that a value is plain JSON, so that it can be hashed and stored."""
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            self.fault("wrong_type", f"{name} cannot be kept ({type(error).__name__})", "text, numbers and lists")
            return False
        return True

    def _messages(self, name: str, value: Any) -> Messages | None:
        messages = []
        for number, item in enumerate(value, 1):
            message = {key: cell for key, cell in item.items() if cell is not None}
            if message.get("tool_calls"):  # such a turn may have no text
                message.setdefault("content", "")
                item = message
            for key in ("role", "content"):
                if key not in item:
                    self.fault("missing_column", f"message {number} of {name!r} has no {key!r}", "role and content")
                    return None
                if item[key] is None:
                    self.fault("null", f"{key!r} of message {number} of {name!r} is null", "text")
                    return None
                if not isinstance(item[key], str):
                    self.fault("wrong_type", f"{key!r} of message {number} of {name!r} is {_kind(item[key])}", "text")
                    return None
                if not self._encodable(name, item[key]):
                    return None
            further = {key: cell for key, cell in message.items() if key not in ("role", "content")}
            if further and not self.plain_data(f"message {number} of {name!r}", further):
                return None
            messages.append(message)
        return tuple(messages)

    def completion(self, name: str, value: Text | None, empty: bool = False) -> Text | None:
        """Check that a completion is not empty and, if it is messages, ends with the assistant."""
        if value is None:
            return None
        if isinstance(value, str):
            last = value
        elif value[-1]["role"] != "assistant":
            self.fault("no_assistant_turn", f"{name!r} ends in a turn of {value[-1]['role']!r}", "an assistant's")
            return None
        else:
            last = value[-1]["content"]
        calls = not isinstance(value, str) and "tool_calls" in value[-1]
        if not empty and not calls and not last.strip():
            self.fault("empty_completion", f"{name!r} is empty", "a response", "drop the row")
            return None
        return value

    def flag(self, column: str) -> bool:
        """Read an optional `ended` column; true by default."""
        value = self.values.get(column)
        return True if value is None else self.as_flag(column, value)

    def as_flag(self, name: str, value: Any) -> bool:
        """Check that `value` is true or false."""
        if not isinstance(value, bool):
            self.fault("wrong_type", f"{name!r} is {_kind(value)}", "true or false")
        return value is True

    def ids(self, column: str) -> tuple[int, ...] | None:
        """Read a required column of token ids."""
        value = self.value(column)
        return None if value is None else self.as_ids(column, value)

    def as_ids(self, name: str, value: Any) -> tuple[int, ...] | None:
        """Check that `value` is a list of token ids."""
        if isinstance(value, (list, tuple)) and set(map(type, value)) <= {int} and min(value, default=0) >= 0:
            return tuple(value)
        self.fault("wrong_type", f"{name!r} is not a list of token ids", "integers >= 0")
        return None

    def number(self, name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float | None:
        """Check that `value` is a finite number from `low` to `high`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fault("wrong_type", f"{name!r} is {_kind(value)}", "a number")
        elif low <= value <= high and abs(value) <= sys.float_info.max:  # an integer may be beyond every float
            return value
        else:
            limits = f"a number from {low:g} to {high:g}" if high < math.inf else "a finite number"
            self.fault("wrong_type", f"{name!r} is out of range", limits)
        return None

    def split(self) -> str | None:
        """Read the optional column `split`."""
        value = self.values.get("split")
        if value is not None and not isinstance(value, str):
            self.fault("wrong_type", f"'split' is {_kind(value)}", "text")
        elif value and not value.isascii():
            self._encodable("split", value)
        return value or None

    def check_prompt(self, prompt: Text) -> None:
        """Check that a prompt of messages ends in a turn that a response can follow."""
        if not isinstance(prompt, str) and prompt[-1]["role"] not in ("user", "tool", "assistant"):
            self.fault("empty_prompt", f"the prompt ends in a turn of {prompt[-1]['role']!r}", "a user's turn")

    def all_ids(self, *columns: str) -> tuple[tuple[int, ...], ...] | None:
        """Read columns of token ids; a row must have all of them or none."""
        values = [self.values.get(column) for column in columns]
        if values.count(None) == len(columns):
            return None
        read = [self.ids(column) for column in columns]
        ids = tuple(one for one in read if one is not None)
        return ids if len(ids) == len(read) else None


@dataclass(frozen=True)
class Schema:
    """The columns of a known format, and how its rows are read.

    Args:
        columns: those that a row must have.
        read: makes the record of a row; returns None after a fault, or for a row that makes no record.
        label: the name of the format.
        also: further columns that are read if they exist.
        objects: a required column of lists of objects; with other values the columns are not of this format.
        gather: replaces the rows first, if a record is spread over several rows, or one row has several records.
    """

    columns: tuple[str, ...]
    read: Callable[[SourceRow], Record | None]
    label: str
    also: tuple[str, ...] = ()
    objects: str | None = None
    gather: Callable[[Rows], tuple[Rows, list[RowFault]]] | None = None


def alpaca_prompt(row: SourceRow) -> Text | None:
    """Read `instruction`, `input`, `system` and `history`: as Alpaca's template, or as messages if the source has the
    columns `system` or `history`."""
    instruction, given = row.string("instruction"), row.string("input") if row.has("input") else ""
    if instruction is None or given is None:
        return None
    if not {"system", "history"} & set(row.columns):
        return instruction_prompt("sections", instruction, given)
    rounds = row.value("history") if row.has("history") else []
    if not isinstance(rounds, list) or any(not isinstance(turns, list) or len(turns) != 2 for turns in rounds):
        row.fault("wrong_type", "'history' is not a list of [question, answer]", "a list of pairs of texts")
        return None
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for pair in rounds for role, text in zip(roles, pair)]
    question = f"{instruction}\n{given}" if given.strip() else instruction
    messages = row.as_text("history", [*turns, {"role": "user", "content": question}])
    return None if messages is None else row.with_system(messages)


def alpaca_parts(row: SourceRow) -> tuple[str, str]:
    """Return the instruction and the input of a row whose prompt `alpaca_prompt` has read as text."""
    return row.values["instruction"], row.values.get("input") or ""


def alike(prompt: Text, completions: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...]]:
    """Turn text into messages if the prompt or a completion is messages."""
    if not isinstance(prompt, str) or any(not isinstance(text, str) for text in completions):
        prompt = _message("user", prompt)
        completions = tuple(_message("assistant", text) for text in completions)
    return prompt, completions


def _message(role: str, text: Text) -> Messages:
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return "an empty list" if value == [] else names.get(type(value), f"a {type(value).__name__}")
