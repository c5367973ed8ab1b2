"""Whether files are still those that this process has read before, without reading them again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

SETTLED = 0.05  # seconds; file systems keep times in ticks of some milliseconds, within which a file can change twice

Stamp = tuple[tuple[str, int, int, int, int, int], ...]


def stamp(paths: Iterable[Path]) -> Stamp | None:
    """Return path, device, inode, size and the times of the last change of every file.

    None where a file is not there, or was changed so recently that a further change could go unseen. A stamp is taken
    before the files are read.
    """
    parts = []
    try:
        for path in paths:
            found = path.stat()
            changed = max(found.st_mtime_ns, found.st_ctime_ns)
            if time.time_ns() - changed < SETTLED * 1e9:
                return None
            key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            parts.append((str(path.resolve()), *key))
    except OSError:
        return None
    return tuple(parts)
