"""Detect the format of rows from their columns, check the rows, and turn them into records.

`SCHEMAS` has every known format; docs/data.md lists them. Prompts and completions are text, or lists of messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_pipeline.data import general, preferences, public
from rlhf_pipeline.data.columns import IDENTICAL, Schema, SourceRow
from rlhf_pipeline.data.decoding import decode_json
from rlhf_pipeline.data.files import RowFault, Rows, by_line
from rlhf_pipeline.data.records import TEMPLATE_VALUES, Record
from rlhf_pipeline.data.sources import world_digest
from rlhf_pipeline.errors import DataError, Fault, did_you_mean

SCHEMAS: list[Schema] = [*public.SCHEMAS, *general.SCHEMAS]
"""All formats, in the order in which they are tried."""
PLAIN_PROMPTS = (
    "prompts are plain text: the model reads them without its chat template; with `text_as_chat: true` each is a "
    "user's turn"
)
LABELS = {1: True, 0: False, -1: False, "true": True, "false": False, "1": True, "0": False, "-1": False}


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
    not_read: tuple[str, ...] = ()  # columns with content that the format does not read; `Record.columns` has them
    against: Counter[str] = field(default_factory=Counter)  # rows whose scores contradict or do not support the label

    def notes(
        self, template: str | None = None, functions: bool | None = None, *, text_as_chat: bool = False
    ) -> list[str]:
        """Return sentences on what a stage does not read, and on labels that other columns contradict.

        Args:
            template: the chat template, if it is known; it may not read the values of `TEMPLATE_VALUES`.
            functions: whether the stage has reward functions, which get all columns; None: no stage is known.
            text_as_chat: whether prompts of plain text become turns of a user.
        """
        named, said = ", ".join(self.not_read), []
        if named and functions:
            said.append(f"read by reward functions only: {named}")
        elif named:
            said.append(f"not read: {named}" + (" (except by reward functions)" if functions is None else ""))
        given = {name for record in self.records if record.extra for name in _for_template(record)}
        if template is not None and (unread := sorted(name for name in given if name not in template)):
            said.append(f"not read by the chat template: {', '.join(unread)}")
        for reason, what in (("contradicted", "contradict the label"), ("equal", "are equal")):
            if count := self.against[reason]:
                said.append(f"scores {what} in {count} of {self.rows} rows: the label is used, not the scores")
        first = self.records[0] if self.records else None
        if template is not None and not text_as_chat and first is not None and isinstance(first.prompt, str):
            said.append(PLAIN_PROMPTS)
        return said

    @property
    def tokenizer_digest(self) -> str | None:
        """The digest of the tokenizer that the records' token ids belong to; a world's is computed by transformers."""
        return world_digest() if self.source.startswith("world:") else self.recorded_digest

    def without(self, faults: list[RowFault]) -> RecordSet:
        """Return the set without the rows that have these further faults."""
        out = {item.fault.where for item in faults}
        records = [record for record in self.records if record.where not in out]
        return replace(self, records=records, faults=by_line([*self.faults, *faults]))


def _for_template(record: Record) -> list[str]:
    """Return the names by which a chat template reads a record's own values."""
    tools = ["tools"] if record.extra.get("tools") else []
    return [*tools, *record.extra.get("chat_template_kwargs", ())]


def count_reasons(faults: list[RowFault]) -> dict[str, int]:
    """Count rows by reason; a row with two reasons counts under both."""
    pairs = {(fault.fault.where, fault.reason) for fault in faults}
    return dict(sorted(Counter(reason for _, reason in pairs).items()))


def parse(rows: Rows, name: str, mapping: Mapping[str, str] | None = None) -> RecordSet:
    """Detect the format of `rows` and turn them into records.

    Args:
        mapping: {our name: their name} of columns to rename first.

    Raises:
        DataError: there are no rows, their columns match no known format, or a column of `mapping` does not exist.
    """
    if not rows:
        raise DataError(Fault(name, "no rows", "at least one"))
    parsed = RecordSet(name, "", len(rows), [])
    rows = renamed(rows, mapping, name) if mapping else rows
    columns = _filled(rows)
    schema = detect(rows, columns, name)
    not_read = columns - {*schema.columns, *schema.also, "split"}
    further = sorted(map(str, set().union(*(row for _, row in rows)) - {*schema.columns, *schema.also, "split"}))
    if schema.gather is not None:
        columns, further = set(), []
        rows, parsed.faults = schema.gather(rows)
    labelled = schema.read in general.DEMONSTRATIONS and _are_labels(rows)
    scores = [names for names in preferences.SCORES if columns.issuperset(names)]
    if schema.read is preferences.implicit:
        parsed.unread = preferences.unread_prompt(dict.fromkeys(column for _, values in rows for column in values))
    for where, values in rows:
        row = SourceRow(where, values, columns)
        record = schema.read(row)
        split = row.split()
        if record is not None and (labelled or record.conversational):
            _add_values(row, record, labelled)
        if row.faults:
            parsed.faults += [replace(item, split=split) for item in row.faults] if split else row.faults
        elif row.skipped is not None:
            parsed.skipped[row.skipped] += 1
        elif record is not None and is_identical(record):
            parsed.skipped[IDENTICAL] += 1
        elif record is not None:
            # The record is new, so it may be changed; `dataclasses.replace` would check every field again.
            record.__dict__.update(where=where, split=split)
            if further:
                record.__dict__["columns"] = {column: values.get(column) for column in further}
            parsed.records.append(record)
            if record.completions[1:] and (reason := preferences.against_label(values, scores)):
                parsed.against[reason] += 1
    parsed.format = schema.label
    if labelled:
        parsed.format, not_read = f"{schema.label}, labelled", not_read - {"label"}
    if any(record.conversational for record in parsed.records[:1]):
        parsed.format, not_read = f"{parsed.format}, conversational", not_read - {*TEMPLATE_VALUES}
    parsed.not_read = tuple(sorted(map(str, not_read)))
    return parsed


def renamed(rows: Rows, mapping: Mapping[str, str], name: str) -> Rows:
    """Rename columns of all rows by {our name: their name}; a column that has our name already is left out.

    Raises:
        DataError: one of our names is no column of a format, or a column does not exist.
    """
    ours = {column for schema in SCHEMAS for column in (*schema.columns, *schema.also)} | {"label", "split"}
    theirs = {str(column) for column in dict.fromkeys(column for _, row in rows for column in row)}
    faults = [
        Fault(f"{name}: column_mapping.{key}", f"no format has a column {key!r}", fix=did_you_mean(key, ours))
        for key in mapping
        if key not in ours | {*TEMPLATE_VALUES}
    ]
    faults += [
        Fault(
            f"{name}: column_mapping.{key}",
            f"no column {column!r}",
            f"one of {', '.join(sorted(theirs))}",
            did_you_mean(column, theirs),
        )
        for key, column in mapping.items()
        if column not in theirs
    ]
    if faults:
        raise DataError(faults)
    gone = {*mapping, *mapping.values()}
    return [
        (
            where,
            {key: value for key, value in row.items() if key not in gone}
            | {key: row[column] for key, column in mapping.items() if column in row},
        )
        for where, row in rows
    ]


def _filled(rows: Rows) -> set[str]:
    """Return the columns that are not empty in every row; an empty `prompt` is one too."""
    found: set[str] = set()
    for _, row in rows:
        for column, value in row.items():
            if column not in found and value is not None and (value not in ("", [], {}) or column == "prompt"):
                found.add(column)
    return found


def _are_labels(rows: Rows) -> bool:
    """Whether the column `label` says of each completion if it is good: true and false, 1 and 0, or 1 and -1."""
    labels = [row["label"] for _, row in rows if row.get("label") is not None]
    return bool(labels) and all(_is_good(label) is not None for label in labels)


def _is_good(label: Any) -> bool | None:
    """Return what a label says, or None if it is something else, such as a class."""
    label = label.strip().lower() if isinstance(label, str) else label
    return LABELS.get(label) if isinstance(label, (bool, int, float, str)) else None


def _add_values(row: SourceRow, record: Record, labelled: bool) -> None:
    """Add a row's label, and what its chat template reads, to its record."""
    extra: dict[str, Any] = {}
    if labelled and (label := row.value("label")) is not None:
        extra["label"] = _is_good(label)
    for column, kind in TEMPLATE_VALUES.items() if record.conversational else ():
        if not row.has(column):
            continue
        value = row.values[column]
        if isinstance(value, str):  # as JSON
            try:
                value = decode_json(value)
            except (ValueError, RecursionError):
                value = None
        if isinstance(value, kind):
            extra[column] = value if row.plain_data(repr(column), value) else None
        else:
            row.fault("wrong_type", f"{column!r} is not a {kind.__name__}", f"a {kind.__name__}, or one as JSON text")
    record.__dict__.update(extra={**record.extra, **extra}, kind="labelled" if labelled else record.kind)


def is_identical(record: Record) -> bool:
    """Whether a record is a pair of equal token sequences, which carries no preference."""
    ids = record.completion_ids
    return record.kind == "pair" and ids is not None and ids[0] == ids[1] and record.ended[0] == record.ended[1]


def detect(rows: Rows, filled: Collection[str], name: str) -> Schema:
    """Return the first schema that at least half of the rows match, else the most frequent one.

    Args:
        filled: the columns that are not empty in every row.

    Raises:
        DataError: the columns match no known format.
    """
    columns = {column for _, row in rows for column, value in row.items() if value is not None}
    shapes = Counter(frozenset(row) for _, row in rows)  # rows of a file are alike: few sets of columns
    counts = [
        sum(count for shape, count in shapes.items() if columns & shape >= set(schema.columns))
        if schema.objects is None or _has_objects(rows, schema.objects)
        else 0
        for schema in SCHEMAS
    ]
    if not any(counts):
        known = "; ".join(", ".join(schema.columns) for schema in general.SCHEMAS)
        there = ", ".join(sorted(map(str, columns))) or "none"
        fix = "name them in column_mapping, for example {prompt: question, completion: answer}, or rename them"
        raise DataError(Fault(name, f"columns {there}", f"one of the column sets: {known}", fix))
    place = next((i for i, count in enumerate(counts) if 2 * count >= len(rows)), counts.index(max(counts)))
    return _pairs_of(SCHEMAS[place], filled, rows) if SCHEMAS[place] is general.PAIR else SCHEMAS[place]


def _has_objects(rows: Rows, column: str) -> bool:
    """Whether a value of a column is a list of objects."""
    lists = (row[column] for _, row in rows if isinstance(row.get(column), list))
    return any(isinstance(one, dict) for values in lists for one in values[:1])


def _pairs_of(schema: Schema, columns: Collection[str], rows: Rows) -> Schema:
    """Return the schema of pairs without a column `prompt`."""
    prompt = preferences.prompt_column(columns)
    if prompt == "prompt":
        return schema
    sides = ("chosen", "rejected")
    transcripts = sum(all(preferences.is_transcript(row.get(side)) for side in sides) for _, row in rows)
    if 2 * transcripts >= len(rows):
        return general.HH
    if prompt is None:
        return general.IMPLICIT
    read = [name for name in ("system", "history", prompt, "input") if name in columns]
    return replace(schema, label=f"pair, the prompt is {' and '.join(map(repr, read))}", also=(*schema.also, *read))
