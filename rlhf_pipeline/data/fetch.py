"""The first rows of a data set of the hub, fetched as a stream: for one that is too large for the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.sources import from_hub, refuse_media
from rlhf_pipeline.disk.storage import claim, staging, sync_tree
from rlhf_pipeline.errors import BadInput, DataError, Fault, UnknownReference, first_line


def fetch(source: str, folder: Path, rows: int, config: str | None = None) -> dict[str, int]:
    """Write the first rows of each split into a new folder of JSON lines, which is a source; return their numbers.

    The files are called SPLIT-00000-of-00001.jsonl. Nothing behind these rows is read, and the folder appears whole or
    not at all. Values that JSON does not have, such as dates, are written as text.

    Args:
        source: hub id. rows: of each split, at most. config: configuration of the data set.

    Raises:
        BadInput: the folder exists. UnknownReference: the source is no hub id.
        DataError: it cannot be loaded, the stream breaks off, or it has NaN or columns that are not text.
        RunFailed: the disk is full, or writing there is not permitted.
    """
    if Path(source).exists() or source.startswith(("world:", "collected:")):
        raise UnknownReference(f"{source}: it is on this machine; expected a hub id, org/name")
    if folder.exists():
        raise BadInput(f"{folder}: exists; expected the name of a new folder")
    loaded = from_hub(source, config, streaming=True)
    tables = dict(loaded) if hasattr(loaded, "keys") else {"train": loaded}
    counts = dict.fromkeys(tables, 0)
    with staging(folder.parent, folder.name) as staged:
        for split, table in tables.items():
            refuse_media(source, table)
            with (staged / f"{split}-00000-of-00001.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                for row in _first(source, split, table, rows):
                    file.write(row + "\n")
                    counts[split] += 1
        sync_tree(staged)
        if not claim(staged, folder):
            raise BadInput(f"{folder}: was made by another process; expected the name of a new folder")
    return counts


def _first(source: str, split: str, table: Any, most: int) -> Iterator[str]:
    """Yield the first rows of a stream as JSON."""
    number = 0
    try:
        for row in islice(table, most):
            number += 1
            try:
                text = json.dumps(row, allow_nan=False, default=str)
            except ValueError as error:
                where = f"{source}[{split}]:{number}"
                raise DataError(Fault(where, first_line(error), "text, numbers and lists")) from error
            yield text
    except DataError:
        raise
    except Exception as error:  # connection, or what the library's readers find
        found = f"the stream of split {split!r} broke off after {number} rows ({first_line(error)})"
        raise DataError(Fault(source, found, "a data set of the hub that can be reached", "try it again")) from error
