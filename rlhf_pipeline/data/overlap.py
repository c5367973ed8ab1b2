"""Rows of an evaluation split that training has seen: the same row, the same prompt, or nearly the same prompt.

The hash of the prompt keeps splits of our own making apart. A source that names its splits itself may not be so
careful, and what is then reported on its test split is memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations

from rlhf_pipeline.data.files import RowFault, row_fault
from rlhf_pipeline.data.formats import count_reasons
from rlhf_pipeline.data.load import RecordSet
from rlhf_pipeline.data.records import Record, normalise, plain
from rlhf_pipeline.data.splits import ALL, FRACTIONS, assign_splits, carries_splits
from rlhf_pipeline.errors import DataError, Fault

EVALUATED = ("validation", "test")
"""Splits that figures are reported on and settings are chosen on, beside the config's own `dataset_test_split`."""

_MARKS = r"[.,;:!?…'\"`´‘’‚“”„«»()\[\]{}_]"
# Between two digits they are part of a number: 3.5 is not 35.
_PUNCTUATION = re.compile(rf"(?<!\d){_MARKS}+|{_MARKS}+(?!\d)")


@lru_cache(maxsize=4096)
def loose(text: str) -> str:
    """Return a text without case, punctuation and differences of white space.

    Signs of arithmetic and of code stay: "3+4" and "3-4" are two texts. A text of nothing else is returned as it is.
    """
    return " ".join(_PUNCTUATION.sub("", normalise(text).casefold()).split()) or text


def loose_key(record: Record) -> str:
    """Return the prompt of a record, of a text record its text, as `loose` does."""
    return loose(record.key)


def leaks(records: Sequence[Record], splits: Sequence[str], train: str, held_out: Collection[str]) -> list[RowFault]:
    """A fault for each row of the `held_out` splits of which `train` has the like, naming both rows.

    Reasons: leaked_row (the whole row), leaked_prompt (the prompt), leaked_similar_prompt (see `loose_key`).
    """
    similar: dict[str, str] = {}
    prompts: dict[str, str] = {}
    rows: dict[str, str] = {}
    for record, split in zip(records, splits):
        if split == train:
            similar.setdefault(loose_key(record), record.where)
            prompts.setdefault(record.prompt_key, record.where)
            rows.setdefault(record.canonical(), record.where)
    faults = []
    for record, split in zip(records, splits):
        if split not in held_out or split == train:
            continue
        there = similar.get(loose_key(record))
        if there is None:
            continue
        exact = prompts.get(record.prompt_key)
        whole = rows.get(record.canonical()) if exact is not None else None
        if whole is not None:
            reason, what, there = "leaked_row", "this row", whole
        elif exact is not None:
            reason, what, there = "leaked_prompt", "its prompt", exact
        else:
            reason, what = "leaked_similar_prompt", "its prompt, but for case and punctuation,"
        found = f"{what} of split {split!r} is in split {train!r} as well, {there}"
        faults.append(row_fault(record.where, reason, found))
    return faults


def keep_apart(found: RecordSet, train: str, test: str, *, skip_bad_rows: bool, allow_overlap: bool) -> RecordSet:
    """Refuse a source whose own splits share prompts, or leave what training has seen out of its evaluation splits.

    Args:
        train: the split that is trained on. test: the split that is reported on, beside those of `EVALUATED`.
        skip_bad_rows: leave the rows out and count them. allow_overlap: look for nothing.

    Raises:
        DataError: rows of an evaluation split are in `train` as well; all of them are listed.
    """
    ours = found.source.startswith(("world:", "collected:"))  # one row a prompt, or split by the prompt's hash
    if allow_overlap or ours or train in (ALL, test) or not carries_splits(found.records, found.source):
        return found
    splits = assign_splits(found.records, FRACTIONS, found.source)
    held_out = {test, *EVALUATED} - {train}
    faults = leaks(found.records, splits, train, held_out)
    if not faults:
        return found
    if not skip_bad_rows:
        asked = sum(split in held_out for split in splits)
        counted = ", ".join(f"{reason} {count}" for reason, count in count_reasons(faults).items())
        summary = Fault(
            found.source,
            f"{len(faults)} of {asked} rows of the evaluation splits are in split {train!r} as well ({counted})",
            "splits that share no prompt",
            "take them out of one of the two, set `skip_bad_rows: true` to leave them out of the evaluation, "
            "or `allow_overlap: true` to keep them",
        )
        raise DataError([summary, *(item.fault for item in faults)])
    out = {item.fault.where for item in faults}
    records = [record for record in found.records if record.where not in out]
    if not carries_splits(records, found.source):
        gone = f"no row of its evaluation splits is new: {train!r} holds them all"
        raise DataError(Fault(found.source, gone, "at least one"))
    return replace(found, records=records, faults=[*found.faults, *faults])


def duplicates(records: Sequence[Record]) -> dict[str, int]:
    """Count the rows that repeat an earlier one: exactly, and only but for case, punctuation and white space."""
    exact = len({record.canonical() for record in records})
    near = len({(loose_key(record), *(loose(plain(text)) for text in record.completions)) for record in records})
    return {"duplicate_rows": len(records) - exact, "similar_rows": max(0, exact - near)}


def repeats(records: Sequence[Record], most: int) -> list[str]:
    """Name the first rows that repeat an earlier one exactly, each with that row; at most `most`."""
    first: dict[str, str] = {}
    found: list[str] = []
    for record in records:
        if len(found) == most:
            break
        content = record.canonical()
        if content in first:
            found.append(f"{record.where} as {first[content]}")
        else:
            first[content] = record.where
    return found


def shared_prompts(records: Sequence[Record], splits: Sequence[str], *, near: bool = False) -> dict[str, int]:
    """Count the prompts that two splits share, by `a/b`; with `near` but for case and punctuation."""
    of: dict[str, set[str]] = {}
    for record, split in zip(records, splits):
        of.setdefault(split, set()).add(loose_key(record) if near else record.prompt_key)
    return {f"{a}/{b}": len(of[a] & of[b]) for a, b in combinations(sorted(of), 2)}
