"""The items of a labelling project: responses that models sample, or those of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.config.mentions import functions
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.samples import lowest_of
from rlhf_pipeline.data.splits import assign_splits
from rlhf_pipeline.errors import BadInput, DataError, Fault
from rlhf_pipeline.labelling.kinds import MAX_RESPONSES, Item, Response, Text
from rlhf_pipeline.labelling.origins import Made, Origin

Say = Callable[[str], None]


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


def _read(config: LabelConfig, home: Path, say: Say) -> Made:
    """The items of a source of rankings or pairs."""
    (data,) = config.sources()
    found = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows, splits=config.splits)
    for note in found.notes(functions=any(functions(config))):
        say(f"{found.source}: {note}")
    splits = assign_splits(found.records, config.split_fractions, found.source)
    usable: list[tuple[Record, str]] = []
    left_out: Counter[str] = Counter()
    for record, split in zip(found.records, splits, strict=True):
        if record.kind not in ("pair", "ranking"):
            expected = "rankings or pairs: rows with two responses or more to a prompt"
            raise DataError(
                Fault(record.where, f"a {record.kind}", expected, "give prompts and policies to sample some")
            )
        if config.splits is not None and split not in config.splits:
            continue
        different = len(set(map(str, record.completions)))
        if different < 2 or different > MAX_RESPONSES:
            left_out["one response" if different < 2 else f"more than {MAX_RESPONSES} responses"] += 1
        else:
            usable.append((record, split))
    chosen = [usable[place] for place in lowest_of([record.prompt_key for record, _ in usable], config.num)]
    for reason, count in left_out.items():
        say(f"{found.source}: {count} rows left out, which have {reason}")
    digest = found.tokenizer_digest
    items = [
        _given(number, record, split, with_ids=digest is not None) for number, (record, split) in enumerate(chosen)
    ]
    merged = sum(len(record.completions) for record, _ in chosen) - sum(len(item.responses) for item in items)
    if merged:
        say(f"{merged} responses are like another one to the same prompt, and are shown once")
    say(f"{len(items)} items of {found.rows} rows of {found.source}")
    uncertainty = None
    if config.reward_model is not None and items:
        from rlhf_pipeline.labelling.sampling import uncertainty_of

        uncertainty = uncertainty_of(items, config, home, say)
    return Made(items, Origin(tokenizer_digest=digest), uncertainty)


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
