"""Assign records to splits: by the source's own splits, else by the hash of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import accumulate

import numpy as np

from rlhf_pipeline.data.records import Record, normalise
from rlhf_pipeline.data.rows import Records, keep, own_splits, places_of, splits_of
from rlhf_pipeline.errors import DataError, Fault, did_you_mean

SPLITS = ("train", "judge", "validation", "test")
FRACTIONS = {"train": 0.8, "judge": 0.08, "validation": 0.04, "test": 0.08}
ALL = "all"


def split_of(prompt: str, fractions: Mapping[str, float] = FRACTIONS) -> str:
    """Return the split of a prompt, the same for every source and stage.

    The first 64 bits of the SHA-256 of the prompt (NFC-normalised, stripped) give a number in [0, 1). The splits
    divide this range in the order train, judge, validation, test, then others by name.
    """
    place = int.from_bytes(sha256(normalise(prompt).encode()).digest()[:8], "big") / 2**64
    names, ends = _ends(fractions)
    return next((name for name, end in zip(names, ends) if place < end), names[-1])  # they sum to 1 up to rounding


def _ends(fractions: Mapping[str, float]) -> tuple[list[str], list[float]]:
    """Return the splits in their order, and where each of them ends in [0, 1)."""
    names = [name for name in SPLITS if name in fractions] + sorted(set(fractions) - set(SPLITS))
    names = [name for name in names if fractions[name] > 0]
    return names, list(accumulate(fractions[name] for name in names))


def carries_splits(records: Sequence[Record], source: str = "") -> bool:
    """Whether a source has its own splits: rows of more than one split, or collected data with a split in each row."""
    named = own_splits(records) - {None}
    return len(named) > 1 or (bool(named) and source.startswith("collected:"))


def assign_splits(records: Sequence[Record], fractions: Mapping[str, float] = FRACTIONS, source: str = "") -> list[str]:
    """Return the split of each record.

    Raises:
        DataError: a source has its own splits, but some rows have none.
    """
    if not carries_splits(records, source):
        if isinstance(records, Records):  # the key of a record is what `split_of` hashes
            heads = np.ascontiguousarray(records.table["keys"][:, :8][records.rows])
            places = heads.view(">u8").ravel().astype(np.float64) / 2**64
            names, ends = _ends(fractions)
            codes = np.minimum(np.searchsorted(ends, places, side="right"), len(names) - 1)
            return np.array(names, object)[codes].tolist()
        return [split_of(record.key, fractions) for record in records]
    splits = splits_of(records)
    if None in splits:
        nameless = [place for place, split in zip(places_of(records), splits) if split is None]
        expected = "a split in each row or in none of them"
        raise DataError([Fault(place, "no split", expected) for place in nameless])
    return [str(split) for split in splits]


def in_split(
    records: Sequence[Record], split: str, fractions: Mapping[str, float] = FRACTIONS, source: str = ""
) -> Sequence[Record]:
    """Return the records of one split, or every record for "all".

    Raises:
        DataError: the split does not exist or is empty.
    """
    if split == ALL:
        return records
    assigned = assign_splits(records, fractions, source)
    mask = [name == split for name in assigned]
    if any(mask):
        return keep(records, mask)
    carried = carries_splits(records, source)
    names = sorted(set(assigned)) if carried else list(fractions)
    if split in names:
        raise DataError(Fault(source, f"split {split!r} is empty: it has none of {len(records)} records", "more rows"))
    origin = "one of the source's splits:" if carried else "one of"
    expected = f"{origin} {', '.join(names)} (or all)"
    raise DataError(Fault(source, f"no split {split!r}", expected, did_you_mean(split, names)))
