"""The items of a labelling project: responses that models sample, or those of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.config.mentions import functions
from rlhf_pipeline.data.columns import SourceRow
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.preferences import ranking
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.samples import lowest_of
from rlhf_pipeline.data.splits import assign_splits
from rlhf_pipeline.errors import BadInput, DataError, Fault
from rlhf_pipeline.labelling.kinds import MAX_RESPONSES, Item, Response, Text
from rlhf_pipeline.labelling.origins import Made, Origin

Say = Callable[[str], None]
RESPONSES = ("completions", "completion_ids", "ended")
"""The columns of responses that have no ranks."""


def make_items(config: LabelConfig, home: Path, say: Say) -> Made:
    """Sample the responses of a project, or read them.

    Raises:
        BadInput: a model or a source cannot be used, or no item is left. RunFailed: memory ran out.
    """
    if config.responses is not None:
        made = _read(config, home, say)
    else:
        from rlhf_pipeline.labelling.sampling import sample

        made = sample(config, home, say)
    if not made.items:
        raise BadInput(
            "rlhf label: found no item with two different responses; expected at least one; use other models"
        )
    return made


def settled(config: LabelConfig, folder: Path | None = None) -> LabelConfig:
    """Return the config with the text of the instructions where it names their file.

    folder: that of the config's own file, in which the file is searched after the working directory.

    Raises:
        BadInput: the file is not there, or is no text.
    """
    named = config.instructions.strip()
    if "\n" in named or not named.endswith((".md", ".txt")):
        return config
    path = Path(named)
    if folder is not None and not path.exists():
        path = folder / path
    try:
        return config.model_copy(update={"instructions": path.read_text(encoding="utf-8")})
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "no UTF-8 text"
        raise BadInput(f"instructions: {named}: {what}; expected a text file, or the text itself") from error


def given_items(config: LabelConfig, home: Path, say: Say) -> tuple[list[Item], str | None]:
    """Read the items of a source of responses, and the digest of the tokenizer that its ids belong to.

    Raises:
        DataError: rows have no responses or cannot be read, or no row has two different responses.
    """
    (data,) = config.sources()
    found = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows, splits=config.splits)
    unread = tuple(name for name in found.not_read if name not in RESPONSES or found.records[0].kind != "prompt")
    for note in replace(found, not_read=unread).notes(functions=any(functions(config))):
        say(f"{found.source}: {note}")
    splits = assign_splits(found.records, config.split_fractions, found.source)
    usable: list[tuple[Record, str]] = []
    left_out: Counter[str] = Counter()
    faults: list[Fault] = []
    for row, split in zip(found.records, splits, strict=True):
        if config.splits is not None and split not in config.splits:
            continue
        try:
            record = _with_responses(row)
        except DataError as error:
            faults += error.faults
            continue
        different = len(set(map(str, record.completions)))
        if different < 2 or different > MAX_RESPONSES:
            left_out["one response" if different < 2 else f"more than {MAX_RESPONSES} responses"] += 1
        else:
            usable.append((record, split))
    if faults and not config.skip_bad_rows:
        raise DataError(faults)
    if faults:
        left_out["no responses that can be read"] += len({fault.where for fault in faults})
    chosen = [usable[place] for place in lowest_of([record.prompt_key for record, _ in usable], config.num)]
    for reason, count in left_out.items():
        say(f"{found.source}: left out rows with {reason}: {count}")
    if not chosen:
        expected = f"a row with two to {MAX_RESPONSES} different responses"
        raise DataError(Fault(found.source, f"none of {found.rows} rows can be compared", expected))
    digest = found.tokenizer_digest
    items = [
        _given(number, record, split, with_ids=digest is not None) for number, (record, split) in enumerate(chosen)
    ]
    merged = sum(len(record.completions) for record, _ in chosen) - sum(len(item.responses) for item in items)
    if merged:
        say(f"responses that are like another one to the same prompt, and are shown once: {merged}")
    say(f"items: {len(items)}, of {found.rows} rows of {found.source}")
    return items, digest


def _read(config: LabelConfig, home: Path, say: Say) -> Made:
    """The items of a source of responses."""
    items, digest = given_items(config, home, say)
    uncertainty = None
    if config.reward_model is not None:
        from rlhf_pipeline.labelling.sampling import uncertainty_of

        uncertainty = uncertainty_of(items, config, home, say)
    return Made(items, Origin(tokenizer_digest=digest), uncertainty)


def _with_responses(row: Record) -> Record:
    """The record of a row of responses; those of `completions` without ranks or scores are a ranking that is all ties.

    Raises:
        DataError: the row has no responses, or they cannot be read.
    """
    if row.kind in ("pair", "ranking"):
        return row
    given = row.columns.get("completions") if row.kind == "prompt" else None
    if given is None:
        expected = "two responses or more to a prompt: `completions` (a list), with ranks or without, or a pair"
        raise DataError(Fault(row.where, f"a {row.kind}", expected, "give prompts and policies to sample some"))
    values = {**row.columns, "prompt": row.prompt}
    values["ranks"] = [1] * len(given) if isinstance(given, list) else None
    if row.prompt_ids is not None and "completion_ids" in values:
        values["prompt_ids"] = row.prompt_ids
    source = SourceRow(row.where, values)
    made = ranking(source)
    if source.faults or made is None:
        raise DataError([one.fault for one in source.faults])
    columns = {name: value for name, value in row.columns.items() if name not in RESPONSES}
    return replace(made, where=row.where, split=row.split, columns=columns)


def _text(text: str | Sequence[dict[str, str]]) -> Text:
    return text if isinstance(text, str) else [dict(turn) for turn in text]


def _given(number: int, record: Record, split: str, *, with_ids: bool) -> Item:
    """The item of a row; responses that are alike are merged."""
    places = {str(text): k for k, text in reversed(list(enumerate(record.completions)))}
    ids = record.completion_ids if with_ids else None
    responses = [
        Response(
            text=_text(record.completions[k]),
            ids=None if ids is None else list(ids[k]),
            ended=record.ended[k] if record.ended else True,
        )
        for k in sorted(places.values())
    ]
    columns = dict(record.columns)
    if with_ids and record.prompt_ids is not None:
        columns["prompt_ids"] = list(record.prompt_ids)
    return Item(number=number, prompt=_text(record.prompt or ""), responses=responses, split=split, columns=columns)
