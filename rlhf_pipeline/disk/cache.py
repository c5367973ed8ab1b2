"""What the cache of a home has: entries by size and last use, and their removal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_pipeline.disk.arrays import TABLE
from rlhf_pipeline.disk.storage import locked, sweep

TOKENS = "tokens"
"""The folder of stores of records and token ids; a store is a table of arrays."""
ANSWERS = "llm"
"""The folder of a language model's answers, which cost requests."""


@dataclass(frozen=True)
class Entry:
    """One thing that the cache has; what is left out of it is made again when it is needed."""

    path: Path
    kind: str
    size: int  # bytes
    used: float  # when it was last made or read, in seconds since 1970
    source: str = ""  # of the data that a store has


def entries(cache: Path) -> list[Entry]:
    """Return what a cache has, the entry first that was used least recently."""
    return sorted([*_stores(cache / TOKENS), *_files(cache)], key=lambda entry: entry.used)


def _stores(folder: Path) -> Iterator[Entry]:
    for table in folder.glob(f"*/{TABLE}"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # being removed, or damaged: it is made again
            used, about = table.stat().st_mtime, json.loads(table.read_bytes())["about"]
            kind = "records" if "format" in about else "token ids"
            yield Entry(table.parent, kind, _size(table.parent), used, str(about.get("source", "")))


def _files(cache: Path) -> Iterator[Entry]:
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            yield Entry(path, path.name.partition("-")[0], path.stat().st_size, path.stat().st_mtime)
    if (answers := cache / ANSWERS).is_dir():
        times = [path.stat().st_mtime for path in answers.rglob("*") if path.is_file()]
        if times:
            yield Entry(answers, ANSWERS, _size(answers), max(times))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(entry: Entry) -> None:
    """Remove an entry; a process that has mapped a store reads on, and no process sees half of one.

    Raises:
        RunFailed: writing there is not permitted.
    """
    parent = entry.path.parent
    if entry.path.is_file():
        entry.path.unlink(missing_ok=True)
        return
    with locked(parent / "locks" / entry.path.name), contextlib.suppress(FileNotFoundError):
        gone = parent / f".{entry.path.name}-{uuid.uuid4().hex[:12]}.tmp"
        os.rename(entry.path, gone)  # what a killed process leaves of it is swept
        shutil.rmtree(gone, ignore_errors=True)
    sweep(parent)
