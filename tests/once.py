"""What takes long to make and is only read: made once for all workers of a run of the tests."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What `make` returns for a new folder: the first worker that asks makes it, the others wait for it and read it.

    Tests of one module go to several workers, and each worker would make a fixture of its own. What is made must be
    picklable, and its files must not be changed.
    """
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    place.mkdir(exist_ok=True)
    made = place / "made.pickle"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return pickle.loads(made.read_bytes())
        tries = len(list(place.iterdir()))
        folder = place / f"folder-{tries}"  # of an earlier try that failed something may be left
        folder.mkdir()
        result = make(folder)
        made.write_bytes(pickle.dumps(result))
        return result
