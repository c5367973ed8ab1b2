"""Tell without reading files again whether they have changed since this process read them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

SETTLED = 0.05  # seconds; file times have ticks of some milliseconds, within which a file can change twice

Stamp = tuple[tuple[str, int, int, int, int, int], ...]


def stamp(paths: Iterable[Path]) -> Stamp | None:
    """Return path, device, inode, size and change times of every file.

    None if a file is missing, or was changed so recently that another change could be missed. Take the stamp before
    reading the files.
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
