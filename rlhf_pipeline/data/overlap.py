"""Find evaluation rows that are also training rows: the same row, the same prompt, or nearly the same prompt.

Splits by the hash of the prompt never share a prompt. A source with its own splits may; results on its test split
would then measure memorisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import combinations, compress, islice
from typing import TYPE_CHECKING

from rlhf_pipeline.data.files import RowFault, row_fault
from rlhf_pipeline.data.formats import RecordSet, count_reasons
from rlhf_pipeline.data.records import Record, normalise, plain
from rlhf_pipeline.data.rows import keep
from rlhf_pipeline.data.splits import ALL, FRACTIONS, assign_splits, carries_splits
from rlhf_pipeline.errors import DataError, Fault

if TYPE_CHECKING:
    from rlhf_pipeline.config.training import TrainingConfig

EVALUATED = ("validation", "test")
"""Splits for reporting and for selecting settings, besides the config's own `dataset_test_split`."""


def evaluation_splits(train: str) -> tuple[str, ...]:
    """Return the evaluation splits that belong to a training split: of train_prefs, validation_prefs and test_prefs."""
    rest = train.removeprefix("train") if train.startswith("train") else ""
    return tuple(name + rest for name in EVALUATED)


def leaked_rows(records: Sequence[Record], splits: Sequence[str]) -> dict[str, list[RowFault]]:
    """Return the faults of `leaks` for each training split of a source: those whose names begin with train."""
    trained = sorted(split for split in set(splits) if split.startswith("train"))
    return {train: leaks(records, splits, train, evaluation_splits(train)) for train in trained}


_MARKS = r"[.,;:!?…'\"`´‘’‚“”„«»()\[\]{}_]"
# Between two digits they are part of a number: 3.5 is not 35.
_PUNCTUATION = re.compile(rf"(?<!\d){_MARKS}+|{_MARKS}+(?!\d)")


@lru_cache(maxsize=4096)
def loose(text: str) -> str:
    """Return a text without case, punctuation and extra white space.

    Symbols of arithmetic and code stay: "3+4" and "3-4" differ. A text of punctuation only is returned unchanged.
    """
    return " ".join(_PUNCTUATION.sub("", normalise(text).casefold()).split()) or text


def loose_key(record: Record) -> str:
    """Return the prompt of a record (the text of a text record), simplified by `loose`."""
    return loose(record.key)


REPEATED: dict[str, tuple[str, Callable[[Record], str]]] = {
    "leaked_row": ("this row", Record.canonical),
    "leaked_prompt": ("its prompt", lambda record: record.prompt_key),
    "leaked_similar_prompt": ("its prompt, except for case and punctuation,", loose_key),
}
"""What a row can share with another, the strongest first."""


def leaks(records: Sequence[Record], splits: Sequence[str], train: str, held_out: Collection[str]) -> list[RowFault]:
    """Return a fault for each row of the `held_out` splits that `train` repeats, naming both rows.

    Reasons: leaked_row (the whole row), leaked_prompt (the prompt), leaked_similar_prompt (see `loose_key`).
    """
    tested = [split in held_out and split != train for split in splits]
    asked = keep(records, tested)
    # Only what an evaluation row can ask for: the training rows may be many.
    known = {reason: dict.fromkeys(map(key, asked), "") for reason, (_, key) in REPEATED.items()}
    for record in keep(records, [split == train for split in splits]):
        for reason, (_, key) in REPEATED.items():
            if known[reason].get(known_as := key(record)) == "":
                known[reason][known_as] = record.where
    faults = []
    for record, split in zip(asked, compress(splits, tested)):
        for reason, (what, key) in REPEATED.items():
            if there := known[reason][key(record)]:
                found = f"{what} of split {split!r} is also in split {train!r}, {there}"
                faults.append(row_fault(record.where, reason, found))
                break
    return faults


def keep_apart(found: RecordSet, config: TrainingConfig) -> RecordSet:
    """Refuse a source whose own splits share prompts, or drop the shared rows from its evaluation splits.

    Args:
        config: its `dataset_test_split` is a split for reporting, besides those of `EVALUATED`; `skip_bad_rows` drops
            and counts the rows; `allow_overlap` checks nothing.

    Raises:
        DataError: rows of an evaluation split are also in `train`; all are listed.
    """
    ours = found.source.startswith(("world:", "collected:"))  # one row a prompt, or split by the prompt's hash
    train, test = config.dataset_train_split, config.dataset_test_split
    if found.whole or config.allow_overlap:
        return found
    if ours or train in (ALL, test) or not carries_splits(found.records, found.source):
        return found
    splits = assign_splits(found.records, FRACTIONS, found.source)
    held_out = {test, *evaluation_splits(train)} - {train}
    faults = leaks(found.records, splits, train, held_out)
    if not faults:
        return found
    if not config.skip_bad_rows:
        asked = sum(split in held_out for split in splits)
        counted = ", ".join(f"{reason} {count}" for reason, count in count_reasons(faults).items())
        summary = Fault(
            found.source,
            f"{len(faults)} of {asked} rows of the evaluation splits are also in split {train!r} ({counted})",
            "splits that share no prompt",
            "remove them from one of the splits, set `skip_bad_rows: true` to drop them from the evaluation, "
            "or `allow_overlap: true` to keep them",
        )
        raise DataError([summary, *(item.fault for item in faults)])
    kept = found.without(faults)
    if not carries_splits(kept.records, found.source):
        gone = f"no row of its evaluation splits is new: {train!r} contains all of them"
        raise DataError(Fault(found.source, gone, "at least one"))
    return kept


def duplicates(records: Sequence[Record]) -> dict[str, int]:
    """Count the rows that repeat an earlier row exactly, or except for case, punctuation and white space."""
    exact = len({record.canonical() for record in records})
    near = len({(loose_key(record), *(loose(plain(text)) for text in record.completions)) for record in records})
    return {"duplicate_rows": len(records) - exact, "similar_rows": max(0, exact - near)}


def repeats(records: Sequence[Record], most: int) -> list[str]:
    """Return the first rows that repeat an earlier row exactly, each with that row; at most `most`."""
    first: dict[str, Record] = {}
    pairs = ((record, first.setdefault(record.canonical(), record)) for record in records)
    return list(islice((f"{row.where} as {earlier.where}" for row, earlier in pairs if row is not earlier), most))


def shared_prompts(records: Sequence[Record], splits: Sequence[str], *, near: bool = False) -> dict[str, int]:
    """Count the prompts that two splits share, by `a/b`; `near` ignores case and punctuation."""
    of: dict[str, set[str]] = {}
    for record, split in zip(records, splits):
        of.setdefault(split, set()).add(loose_key(record) if near else record.prompt_key)
    return {f"{a}/{b}": len(of[a] & of[b]) for a, b in combinations(sorted(of), 2)}
