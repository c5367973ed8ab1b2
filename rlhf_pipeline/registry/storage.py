"""Files that appear whole or not at all: staging, syncing, claiming a version, replacing a file."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_pipeline.errors import RunFailed

# A staging folder this old was left by a process that was killed.
_STALE_SECONDS = 24 * 3600


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden folder beside the final place; what is left of it at the end is removed.

    Raises:
        RunFailed: the disk is full.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    folder = parent / f".{name}-{uuid.uuid4().hex[:12]}.tmp"
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            found = f"{parent}: {error.strerror} while writing {name}"
            raise RunFailed(f"{found}; free some space and rerun") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def claim(staged: Path, target: Path) -> bool:
    """Rename a staged folder to its final place; return False where that place is taken.

    Renaming onto a folder that is not empty fails, and no version is empty: of several processes that
    claim the same version exactly one succeeds.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(staged, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    sync(target.parent)
    return True


def sync(path: Path) -> None:
    """Bring a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder`, and itself, to disk."""
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock: for changes that read before they write."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(parent: Path) -> None:
    now = time.time()
    for folder in parent.glob(".*.tmp"):
        try:
            if folder.is_dir() and now - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue
