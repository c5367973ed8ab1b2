"""Detect the format of rows from their columns, check the rows, and turn them into records.

| columns                                  | record        |
| ---------------------------------------- | ------------- |
| `prompt`, `chosen`, `rejected`           | pair          |
| `chosen`, `rejected`                     | pair: the prompt is their common beginning; in HH transcripts, everything up to and including the last "Assistant:" |
| `prompt`, `completions`, `ranks`/`scores`| ranking (rank 1 is best; a higher score is better) |
| `prompt`, `completion`                   | demonstration |
| `messages`                               | demonstration: the last turn is the completion |
| `instruction`, [`input`,] `output`       | demonstration (Alpaca) |
| `conversations` of `from`, `value`       | demonstration (ShareGPT) |
| `text`                                   | text          |
| `prompt`                                 | prompt        |

Prompts and completions are text, or lists of messages. Optional columns: `ended`, `chosen_ended`,
`rejected_ended`, `split`, `label_probability`, and token ids: `prompt_ids`, `completion_ids`, `chosen_ids`,
`rejected_ids`.
"""  # noqa: E501

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_pipeline.data import preferences
from rlhf_pipeline.data.columns import IDENTICAL, SourceRow, alike
from rlhf_pipeline.data.files import RowFault, by_line
from rlhf_pipeline.data.records import Messages, Record
from rlhf_pipeline.data.sources import world_digest
from rlhf_pipeline.data.styles import instruction_prompt
from rlhf_pipeline.errors import DataError, Fault

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class RecordSet:
    """Every usable record of a source, and its faulty and skipped rows."""

    source: str
    format: str
    rows: int  # all rows read
    records: list[Record]
    faults: list[RowFault] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # valid rows without information
    recorded_digest: str | None = None  # from the manifest of collected data
    whole: str | None = None  # the split, or all, whose rows are used whole; None: a stage chooses among the splits
    unread: str | None = None  # with implicit prompts: a column that looks like the prompt

    @property
    def tokenizer_digest(self) -> str | None:
        """The digest of the tokenizer that the records' token ids belong to; a world's is computed by transformers."""
        return world_digest() if self.source.startswith("world:") else self.recorded_digest

    def without(self, faults: list[RowFault]) -> RecordSet:
        """Return the set without the rows that have these further faults."""
        out = {item.fault.where for item in faults}
        records = [record for record in self.records if record.where not in out]
        return replace(self, records=records, faults=by_line([*self.faults, *faults]))


def count_reasons(faults: list[RowFault]) -> dict[str, int]:
    """Count rows by reason; a row with two reasons counts under both."""
    pairs = {(fault.fault.where, fault.reason) for fault in faults}
    return dict(sorted(Counter(reason for _, reason in pairs).items()))


def parse(rows: list[tuple[str, dict[str, Any]]], name: str) -> RecordSet:
    """Detect the format of `rows` and turn them into records.

    Raises:
        DataError: there are no rows, or their columns match no known format.
    """
    if not rows:
        raise DataError(Fault(name, "no rows", "at least one"))
    layout, label = detect(rows, name)
    parsed = RecordSet(name, label, len(rows), [])
    if layout is preferences.implicit:
        parsed.unread = preferences.unread_prompt(dict.fromkeys(column for _, values in rows for column in values))
    for where, values in rows:
        row = SourceRow(where, values)
        record = layout(row)
        split = row.split()
        if row.faults:
            parsed.faults += row.faults
        elif record is not None and is_identical(record):
            parsed.skipped[IDENTICAL] += 1
        elif record is not None:
            # The record is new, so it may be changed; `dataclasses.replace` would check every field again.
            record.__dict__.update(where=where, split=split)
            parsed.records.append(record)
    if any(record.conversational for record in parsed.records[:1]):
        parsed.format += ", conversational"
    return parsed


def is_identical(record: Record) -> bool:
    """Whether a record is a pair of equal token sequences, which carries no preference."""
    ids = record.completion_ids
    return record.kind == "pair" and ids is not None and ids[0] == ids[1] and record.ended[0] == record.ended[1]


def detect(rows: list[tuple[str, dict[str, Any]]], name: str) -> tuple[Callable[[SourceRow], Record | None], str]:
    """Return the first layout that at least half of the rows match, else the most frequent one, and its name.

    Raises:
        DataError: the columns match no known format.
    """
    columns = {column for _, row in rows for column, value in row.items() if value is not None}
    shapes = Counter(frozenset(row) for _, row in rows)  # rows of a file are alike: few sets of columns
    counts = [
        sum(count for shape, count in shapes.items() if all(column in columns & shape for column in required))
        for required, _, _ in LAYOUTS
    ]
    if not any(counts):
        known = "; ".join(", ".join(required) for required, _, _ in LAYOUTS)
        there = ", ".join(sorted(map(str, columns))) or "none"
        raise DataError(Fault(name, f"columns {there}", f"one of the column sets: {known}", "rename the columns"))
    chosen = next((i for i, count in enumerate(counts) if 2 * count >= len(rows)), counts.index(max(counts)))
    _, layout, label = LAYOUTS[chosen]
    if layout is preferences.pair and "prompt" not in columns:
        transcripts = sum(
            preferences.is_transcript(row.get("chosen")) and preferences.is_transcript(row.get("rejected"))
            for _, row in rows
        )
        if 2 * transcripts >= len(rows):
            return preferences.hh, "pair, HH transcripts"
        return preferences.implicit, "pair, implicit prompt"
    return layout, label


def _demonstration(row: SourceRow) -> Record | None:
    prompt, completion = row.text("prompt"), row.text("completion")
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
    return Record("demonstration", messages[:-1], (messages[-1:],), (row.flag("ended"),), turns=True)


def _alpaca(row: SourceRow) -> Record | None:
    instruction, output = row.string("instruction"), row.string("output")
    given = row.string("input") if row.has("input") else ""
    if instruction is None or output is None or given is None:
        return None
    prompt = instruction_prompt("sections", instruction, given)
    row.completion("output", output)
    return Record("demonstration", prompt, (output,), (row.flag("ended"),), instruction=(instruction, given))


def _text(row: SourceRow) -> Record | None:
    text = row.string("text")
    if text is None:
        return None
    row.completion("text", text)
    return Record("text", None, (text,), (row.flag("ended"),))


def _prompt(row: SourceRow) -> Record | None:
    prompt = row.text("prompt")
    if prompt is None:
        return None
    row.check_prompt(prompt)
    ids = row.all_ids("prompt_ids")
    return Record("prompt", prompt, prompt_ids=ids[0] if ids else None)


LAYOUTS: list[tuple[tuple[str, ...], Callable[[SourceRow], Record | None], str]] = [
    (("chosen", "rejected"), preferences.pair, "pair"),
    (("prompt", "completions", "ranks"), preferences.ranking, "ranking"),
    (("prompt", "completions", "scores"), preferences.ranking, "ranking"),
    (("prompt", "completion"), _demonstration, "demonstration"),
    (("messages",), _messages, "demonstration, messages"),
    (("instruction", "output"), _alpaca, "demonstration, Alpaca"),
    (("conversations",), _sharegpt, "demonstration, ShareGPT"),
    (("text",), _text, "text"),
    (("prompt",), _prompt, "prompt"),
]
