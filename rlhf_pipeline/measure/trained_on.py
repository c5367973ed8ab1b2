"""How a model was trained: its temperature, and what has changed in its data since then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rlhf_pipeline.data.load import RecordSet, records_digest
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.sources import local_path
from rlhf_pipeline.data.splits import FRACTIONS, in_split
from rlhf_pipeline.errors import DataError, Fault, UnknownReference
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.report.results import DataChange

DIGITS = 12


@contextmanager
def owned_by(resolved: Resolved, values: Mapping[str, object], remedy: str = "pass --prompts SOURCE") -> Iterator[None]:
    """Add to the error for a missing source which model's manifest names it, and what to do.

    Args:
        values: the values of the model's config; its local sources are looked up first.

    Raises:
        UnknownReference, DataError: the errors of reading a source, with the model's name added.
    """
    whose = f"these are the data of {resolved.label} (named in its manifest): run it where it was trained, or {remedy}"
    datasets = values.get("datasets")
    parts = datasets if isinstance(datasets, list) else [values]
    keys = ("dataset_name", "dataset_test_name")
    named = [str(part[key]) for part in parts for key in keys if part.get(key)]
    files = [source for source in named if not source.startswith(("world:", "collected:"))]
    there: list[object] = []
    try:
        there = [local_path(source) for source in files]
        yield
    except UnknownReference as error:
        raise UnknownReference(f"{error}; {whose}") from None
    except DataError as error:
        if None not in there:  # not a source that may be on the hub
            raise
        raise DataError([*error.faults, Fault("", whose)]) from None


def training_temperature(resolved: Resolved) -> float:
    """The temperature that a policy's logits were divided by in training: PPO's `temperature`; 1 in other stages."""
    return float(resolved.config.get("temperature") or 1.0)


def changes_of(resolved: Resolved, sources: Sequence[RecordSet]) -> list[DataChange]:
    """The splits of a model's data whose records have other digests than its manifest has.

    The built-in world is left out, since it never changes.

    Args:
        sources: the sources as they are now, each read whole.
    """
    manifest = resolved.manifest
    if manifest is None:
        return []
    fractions = manifest.config.get("split_fractions") or FRACTIONS
    changes = []
    for entry in manifest.data:
        there = [one for one in sources if _base(one.source) == _base(entry.source)]
        if not there or entry.split is None or entry.source.startswith("world:"):
            continue
        # Several parts of one source have the same name: it is unchanged if any of them matches.
        parts = [(one, _records(one, entry.split, fractions)) for one in there]
        if any(records and records_digest(records) == entry.digest for _, records in parts):
            continue
        read, records = parts[0]
        found = records_digest(records) if records else None
        now = "found no rows" if found is None else f"found digest {found[:DIGITS]} ({len(records)} rows)"
        text = (
            f"the data of {resolved.label} have changed since it was trained: {read.source}, split {entry.split}: "
            f"{now}, its manifest has {entry.digest[:DIGITS]} ({entry.rows} rows) of {entry.source}; prompts and "
            "pairs are those of the data as they are now"
        )
        changes.append(
            DataChange(
                model=resolved.label,
                source=read.source,
                split=entry.split,
                found=found,
                expected=entry.digest,
                rows=len(records),
                expected_rows=entry.rows,
                text=text,
            )
        )
    return changes


def _records(read: RecordSet, split: str, fractions: Mapping[str, float]) -> Sequence[Record]:
    try:
        return in_split(read.records, split, fractions, read.source)
    except DataError:
        return []


def note_changes(known: list[DataChange], changes: Sequence[DataChange]) -> list[DataChange]:
    """Add the changes of data that are not known yet, and return those."""

    def data(change: DataChange) -> tuple[str | None, ...]:
        return change.source, change.split, change.found, change.expected

    seen = {data(change) for change in known}
    new = [change for change in changes if data(change) not in seen]
    known += new
    return new


def _base(source: str) -> str:
    """The name of a source, without the version of collected data."""
    return source.partition("@")[0] if source.startswith("collected:") else source
