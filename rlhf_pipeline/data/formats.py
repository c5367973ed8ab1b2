"""Detect the format of rows from their columns, check the rows, and turn them into records.

`SCHEMAS` has every known format; docs/data.md lists them. Prompts and completions are text, or lists of messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_pipeline.data import general, preferences, public
from rlhf_pipeline.data.columns import IDENTICAL, Schema, SourceRow
from rlhf_pipeline.data.files import Row, RowFault, by_line
from rlhf_pipeline.data.records import TEMPLATE_VALUES, Record
from rlhf_pipeline.data.rows import keep, places_of
from rlhf_pipeline.data.sources import world_digest
from rlhf_pipeline.disk.decoding import decode_json
from rlhf_pipeline.errors import DataError, Fault, did_you_mean

SCHEMAS: list[Schema] = [*public.SCHEMAS, *general.SCHEMAS]
"""All formats, in the order in which they are tried."""
PLAIN_PROMPTS = (
    "prompts are plain text: the model reads them without its chat template; with `text_as_chat: true` each is a "
    "user's turn"
)
NO_MARGIN = (
    "`use_margin: true` subtracts the column 'margin' from the difference of the two rewards; it moves the optimum, so "
    "it is not used unasked (TRL's RewardTrainer uses it whenever it is there)"
)
LABELS = {1: True, 0: False, -1: False, "true": True, "false": False, "1": True, "0": False, "-1": False}


@dataclass
class RecordSet:
    """Every usable record of a source, and its faulty and skipped rows."""

    source: str
    format: str
    rows: int  # all rows read
    records: Sequence[Record]
    faults: list[RowFault] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # valid rows without information
    recorded_digest: str | None = None  # from the manifest of collected data
    whole: str | None = None  # the split, or all, whose rows are used whole; None: a stage chooses among the splits
    unread: str | None = None  # with implicit prompts: a column that looks like the prompt
    not_read: tuple[str, ...] = ()  # columns with content that the format does not read; `Record.columns` has them
    against: Counter[str] = field(default_factory=Counter)  # rows whose scores contradict or do not support the label
    template_values: frozenset[str] | None = None  # the names of `for_template` in all records; None: not known

    def notes(
        self,
        template: str | None = None,
        functions: bool | None = None,
        *,
        text_as_chat: bool = False,
        use_margin: bool | None = None,
    ) -> list[str]:
        """Return sentences on what a stage does not read, and on labels that other columns contradict.

        Args:
            template: the chat template, if it is known; it may not read the values of `TEMPLATE_VALUES`.
            functions: whether the stage has reward functions, which get all columns; None: no stage is known.
            text_as_chat: whether prompts of plain text become turns of a user.
            use_margin: that of the stage's config; None: it has no such key.
        """
        named, said = ", ".join(name for name in self.not_read if not (use_margin and name == preferences.MARGIN)), []
        if named and functions:
            said.append(f"read by reward functions only: {named}")
        elif named:
            said.append(f"not read: {named}" + (" (except by reward functions)" if functions is None else ""))
        if use_margin is False and preferences.MARGIN in self.not_read:
            said.append(NO_MARGIN)
        given = self.template_names() if template is not None else ()
        if template is not None and (unread := sorted(name for name in given if name not in template)):
            said.append(f"not read by the chat template: {', '.join(unread)}")
        for reason, what in (("contradicted", "contradict the label"), ("equal", "are equal")):
            if count := self.against[reason]:
                said.append(f"scores {what} in {count} of {self.rows} rows: the label is used, not the scores")
        first = self.records[0] if self.records else None
        if template is not None and not text_as_chat and first is not None and isinstance(first.prompt, str):
            said.append(PLAIN_PROMPTS)
        return said

    def template_names(self) -> frozenset[str]:
        """Return the names of `for_template` in all records."""
        if self.template_values is not None:
            return self.template_values
        return frozenset(name for record in self.records if record.extra for name in for_template(record))

    @property
    def tokenizer_digest(self) -> str | None:
        """The digest of the tokenizer that the records' token ids belong to; a world's is computed by transformers."""
        return world_digest() if self.source.startswith("world:") else self.recorded_digest

    def without(self, faults: list[RowFault]) -> RecordSet:
        """Return the set without the rows that have these further faults."""
        out = {item.fault.where for item in faults}
        records = keep(self.records, [place not in out for place in places_of(self.records)])
        return replace(self, records=records, faults=by_line([*self.faults, *faults]))


def for_template(record: Record) -> list[str]:
    """Return the names by which a chat template reads a record's own values."""
    tools = ["tools"] if record.extra.get("tools") else []
    return [*tools, *record.extra.get("chat_template_kwargs", ())]


def count_reasons(faults: list[RowFault]) -> dict[str, int]:
    """Count rows by reason; a row with two reasons counts under both."""
    pairs = {(fault.fault.where, fault.reason) for fault in faults}
    return dict(sorted(Counter(reason for _, reason in pairs).items()))


@dataclass
class Survey:
    """What the rows of a source have in common, found in one pass over them."""

    rows: int = 0
    shapes: Counter[frozenset[str]] = field(default_factory=Counter)  # the sets of columns of rows
    columns: dict[str, None] = field(default_factory=dict)  # in the order in which they first occur
    there: set[str] = field(default_factory=set)  # those that are not null in every row
    filled: set[str] = field(default_factory=set)  # those that are not empty in every row; an empty `prompt` is not
    objects: set[str] = field(default_factory=set)  # those of `OBJECTS` with a list of objects
    transcripts: int = 0  # rows whose two sides are HH transcripts
    labels: int = 0  # rows with a label
    good_or_bad: bool = True  # whether every label says if a completion is good

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Survey:
        """Return the survey of some rows."""
        found = cls()
        for _, row in rows:
            found.add(row)
        return found

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.rows += 1
        self.shapes[frozenset(row)] += 1
        for column, value in row.items():
            if column not in self.filled:
                self.columns.setdefault(column)
                if value is not None:
                    self.there.add(column)
                    if value not in ("", [], {}) or column == "prompt":
                        self.filled.add(column)
        for column in OBJECTS:
            values = row.get(column)
            if isinstance(values, list) and any(isinstance(one, dict) for one in values[:1]):
                self.objects.add(column)
        if "rejected" in row and all(preferences.is_transcript(row.get(side)) for side in ("chosen", "rejected")):
            self.transcripts += 1
        if row.get("label") is not None:
            self.labels += 1
            self.good_or_bad &= _is_good(row["label"]) is not None


OBJECTS = {schema.objects for schema in SCHEMAS if schema.objects is not None}
"""Columns whose values tell a format from others."""


def parse(rows: Iterable[Row], name: str, mapping: Mapping[str, str] | None = None) -> RecordSet:
    """Detect the format of `rows` and turn them into records.

    Args:
        rows: are read twice. mapping: {our name: their name} of columns to rename first.

    Raises:
        DataError: there are no rows, their columns match no known format, or a column of `mapping` does not exist.
    """
    parsed, records = parse_stream(rows, name, mapping)
    parsed.records = list(records)
    return parsed


def parse_stream(
    rows: Iterable[Row], name: str, mapping: Mapping[str, str] | None = None
) -> tuple[RecordSet, Iterator[Record]]:
    """As `parse`; the records are made one by one, and faults and counts are whole when there are no more of them."""
    survey = Survey.of(rows)
    if not survey.rows:
        raise DataError(Fault(name, "no rows", "at least one"))
    if mapping:
        rows = renamed(rows, mapping, name, survey.columns)
        survey = Survey.of(rows)
    columns = survey.filled
    schema = detect(survey, name)
    not_read = columns - {*schema.columns, *schema.also, "split"}
    further = sorted(map(str, {*survey.columns} - {*schema.columns, *schema.also, "split"}))
    parsed = RecordSet(name, schema.label, survey.rows, [])
    if schema.gather is not None:
        columns, further = set(), []
        rows, parsed.faults = schema.gather(list(rows))
    labelled = schema.read in general.DEMONSTRATIONS and bool(survey.labels) and survey.good_or_bad
    if schema.read is preferences.implicit:
        parsed.unread = preferences.unread_prompt(survey.columns)
    if labelled:
        parsed.format, not_read = f"{schema.label}, labelled", not_read - {"label"}
    parsed.not_read = tuple(sorted(map(str, not_read)))
    return parsed, _records(rows, schema, parsed, columns, further, labelled)


def _records(
    rows: Iterable[Row], schema: Schema, parsed: RecordSet, columns: set[str], further: list[str], labelled: bool
) -> Iterator[Record]:
    """Yield the records of rows; add to `parsed` what is faulty, skipped or against its label."""
    scores = [names for names in preferences.SCORES if columns.issuperset(names)]
    first = True
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
            if record.completions[1:] and (reason := preferences.against_label(values, scores)):
                parsed.against[reason] += 1
            if first and record.conversational:
                parsed.format = f"{parsed.format}, conversational"
                parsed.not_read = tuple(name for name in parsed.not_read if name not in TEMPLATE_VALUES)
            first = False
            yield record


def renamed(rows: Iterable[Row], mapping: Mapping[str, str], name: str, columns: Iterable[str]) -> Renamed:
    """Rename columns of all rows by {our name: their name}; a column that has our name already is left out.

    Args:
        columns: those that some rows have.

    Raises:
        DataError: one of our names is no column of a format, or a column does not exist.
    """
    ours = {column for schema in SCHEMAS for column in (*schema.columns, *schema.also)} | {"label", "margin", "split"}
    theirs = {*map(str, columns)}
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
    return Renamed(rows, mapping)


@dataclass(frozen=True)
class Renamed:
    """Rows with other names for some of their columns."""

    rows: Iterable[Row]
    mapping: Mapping[str, str]

    def __iter__(self) -> Iterator[Row]:
        gone = {*self.mapping, *self.mapping.values()}
        for where, row in self.rows:
            kept = {key: value for key, value in row.items() if key not in gone}
            yield where, kept | {key: row[column] for key, column in self.mapping.items() if column in row}


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


def detect(survey: Survey, name: str) -> Schema:
    """Return the first schema that at least half of the rows match, else the most frequent one.

    Raises:
        DataError: the columns match no known format.
    """
    columns = survey.there
    counts = [
        sum(count for shape, count in survey.shapes.items() if columns & shape >= set(schema.columns))
        if schema.objects is None or schema.objects in survey.objects
        else 0
        for schema in SCHEMAS
    ]
    if not any(counts):
        known = "; ".join(", ".join(schema.columns) for schema in general.SCHEMAS)
        there = ", ".join(sorted(map(str, columns))) or "none"
        fix = "name them in column_mapping, for example {prompt: question, completion: answer}, or rename them"
        raise DataError(Fault(name, f"columns {there}", f"one of the column sets: {known}", fix))
    place = next((i for i, count in enumerate(counts) if 2 * count >= survey.rows), counts.index(max(counts)))
    return _pairs_of(SCHEMAS[place], survey) if SCHEMAS[place] is general.PAIR else SCHEMAS[place]


def _pairs_of(schema: Schema, survey: Survey) -> Schema:
    """Return the schema of pairs without a column `prompt`."""
    prompt = preferences.prompt_column(survey.filled)
    if prompt == "prompt":
        return schema
    if 2 * survey.transcripts >= survey.rows:
        return general.HH
    if prompt is None:
        return general.IMPLICIT
    read = [name for name in ("system", "history", prompt, "input") if name in survey.filled]
    return replace(schema, label=f"pair, the prompt is {' and '.join(map(repr, read))}", also=(*schema.also, *read))
