"""Files of the cache that one process makes while others wait or do other work, and values that are kept in them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_pipeline.disk.storage import lock, mark_used, replace_text, writing


class Busy(Exception):
    """Another process makes the file."""


@contextmanager
def claimed(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the right to make a file of the cache; another process may have made it before, so look at it again.

    The lock is that of the file itself, which is empty until it is replaced. The system releases it when the process
    ends in any way.

    Raises:
        Busy: another process has the right, and `wait` is False.
        RunFailed: the disk is full, or writing there is not permitted.
    """
    with writing(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(str(path)) from None
        yield
    finally:
        os.close(handle)


def kept(path: Path, make: Callable[[], Any], *, wait: bool = True) -> Any:
    """Return the value of a file, as JSON has it; if the file is missing or damaged, `make` makes the value first.

    Numbers keep every bit, also NaN and infinities.

    Raises:
        Busy, RunFailed: see `claimed`.
    """
    if (found := _read(path)) is not None:
        mark_used(path)
        return found[0]
    with claimed(path, wait=wait):
        if (found := _read(path)) is not None:
            return found[0]
        text = json.dumps(make())
        replace_text(path, f"{sha256(text.encode()).hexdigest()}\n{text}\n")
    return json.loads(text)


def _read(path: Path) -> tuple[Any] | None:
    """The value of a file; None if the file is missing, or not what was written."""
    try:
        digest, text = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError):
        return None
    return (json.loads(text),) if sha256(text.encode()).hexdigest() == digest else None
