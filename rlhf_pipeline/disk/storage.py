"""Files that appear whole or not at all: staging, syncing, claiming a version, replacing a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlhf_pipeline.errors import RlhfError, RunFailed

# Temporary files are short-lived: one this old was left by a killed process.
_STALE_SECONDS = 24 * 3600
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# The form of system errors in Rust libraries (safetensors, tokenizers) and in `shutil` for several files.
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def error_number(error: BaseException | None) -> int | None:
    """Return the errno of an error, also if only its message has it; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := _OS_ERROR.search(str(error)):
            return int(match[1] or match[2])
        error = error.__cause__
    return None


def failure_of(error: BaseException, place: object, what: str = "") -> str | None:
    """Return one line about a full disk or a missing permission; None for any other error.

    what: what was being written; empty if unknown.
    """
    number = error_number(error)
    named = getattr(error, "filename", None)
    if isinstance(named, str | bytes | os.PathLike) and not (what and os.fsdecode(named).startswith(str(place))):
        place = os.fsdecode(named)
    during = f" while writing {what}" if what else ""
    if number in _FULL:
        found = f"disk full: {place}: {os.strerror(number)}{during}"
        return f"{found}; earlier files are unchanged; free some space and run the same command again"
    if number in _CLOSED:
        found = f"no permission: {place}: {os.strerror(number)}{during}"
        if not what:
            return f"{found}; give this account access, or use another place"
        return f"{found}; earlier files are unchanged; allow writing there, or use another place (--home)"
    return None


def not_permitted(error: BaseException) -> bool:
    """Whether an error comes from a missing permission."""
    return error_number(error) in _CLOSED


@contextmanager
def writing(place: Path, what: str) -> Iterator[None]:
    """Turn errors about a full disk or a missing permission into one line with the place.

    Raises:
        RunFailed: the disk is full, or writing at `place` is not permitted.
    """
    try:
        yield
    except Exception as error:
        failure = None if isinstance(error, RlhfError) else failure_of(error, place, what)
        if failure is None:
            raise
        raise RunFailed(failure) from error


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden folder beside the final place; if it is still there at the end, it is removed.

    Raises:
        RunFailed: the disk is full, or writing there is not permitted.
    """
    with writing(parent, name):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        folder, handle = _new(parent / name, Path.mkdir)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _new(path: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a temporary file or folder beside a path and hold its lock, which shows `sweep` that its process is alive.

    The system releases the lock when the process ends in any way. Process ids are not used, because other containers
    repeat them.
    """
    while True:
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
        create(temporary)
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked
            handle = os.open(temporary, os.O_RDONLY)
            lock(handle, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, handle
            os.close(handle)


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def only_here(file: IO[str]) -> None:
    """Close a locked file in forked children: a worker that outlives its parent would keep the lock."""
    _held.add(file)


def _let_go() -> None:
    for file in list(_held):
        with contextlib.suppress(OSError):
            file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def lock(handle: int, how: int) -> bool:
    """Lock an open file; return False if the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and `how` does not wait.
    """
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def sweep(parent: Path) -> None:
    """Remove unfinished files of dead processes from a folder; never those of a running process."""
    for path in parent.glob(".*.tmp"):
        try:
            _remove_if_dead(path)
        except OSError:  # it is in use, has just been removed, or may not be removed
            continue


def _remove_if_dead(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        locked = lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        about = os.fstat(handle)
        # Processes lock the folders and files that they create; without locks the age decides.
        if not locked and time.time() - about.st_mtime <= _STALE_SECONDS:
            return
        if stat.S_ISDIR(about.st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(handle)


def claim(staged: Path, target: Path) -> bool:
    """Rename a staged folder to its final place; return False if that place is taken.

    Renaming onto a non-empty folder fails, and no version is empty. Exactly one of several processes that claim the
    same version succeeds.
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
    """Sync a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder and every file and folder below it to disk."""
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(folder)


def mark_used(path: Path) -> None:
    """Note that a file is used now: its time of change is that of its last use."""
    with contextlib.suppress(OSError):  # not ours to change, or removed
        os.utime(path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old content or the new one.

    Raises:
        RunFailed: the disk is full, or writing there is not permitted.
    """
    with writing(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary, handle = _new(path, lambda new: new.touch(exist_ok=False))
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # under the lock of the file, so that `sweep` leaves it alone
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)
        sync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, for changes that read before they write.

    Raises:
        RunFailed: writing there is not permitted, or the disk is full.
    """
    with writing(folder, "its lock"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
        only_here(file)  # a child that outlives this process would keep the lock
    with file:
        lock(file.fileno(), fcntl.LOCK_EX)
        yield
