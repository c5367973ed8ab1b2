"""Tables of flat arrays: in memory, or as files that are mapped into it.

The files of a table are written by one process, while others wait, and appear whole or not at all. They are verified by
digests; a damaged table is made again.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_pipeline.disk.sealed import seal, unseal
from rlhf_pipeline.disk.stamps import Stamp, stamp
from rlhf_pipeline.disk.storage import claim, locked, mark_used, not_permitted, staging, writing
from rlhf_pipeline.errors import RunFailed

TABLE = "table.json"
_PIECE = 1 << 20
_PLACES = 1 << 16  # entries that are read between two calls of `release`

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Table:
    """Arrays by name, and what else is known of them, as plain data.

    digest: of the content, if it is on disk.
    """

    arrays: Mapping[str, Array]
    about: Mapping[str, Any]
    digest: str | None = None

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def text(self, name: str, number: int) -> str:
        """Return an entry of an array of texts (`Writer.texts`)."""
        ends = self.arrays[f"{name}_ends"]
        start = int(ends[number - 1]) if number else 0
        return self.arrays[name][start : int(ends[number])].tobytes().decode("utf-8", errors="surrogatepass")

    def release(self) -> None:
        """Let go of the pages of all arrays (`release`)."""
        for array in self.arrays.values():
            release(array)


def release(array: Array) -> None:
    """Let go of the pages of a mapped array.

    They count as resident memory of the process as long as it runs, once they were read. Afterwards they are still in
    the system's cache of files, from where they return when they are read again. Arrays in memory stay as they are.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def entries(array: Array, places: Array) -> Array:
    """Return `array[places]` of a mapped array, of which few pages are resident at once if `places` ascend."""
    found = np.empty((len(places), *array.shape[1:]), array.dtype)
    for start in range(0, len(places), _PLACES):
        found[start : start + _PLACES] = array[places[start : start + _PLACES]]
        release(array)
    return found


@dataclass
class Writer:
    """Collects the rows of a table.

    folder: where its files are; None: in memory.
    """

    folder: Path | None = None
    _parts: dict[str, list[Array]] = field(default_factory=dict)
    _files: dict[str, Any] = field(default_factory=dict)
    _dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    _ends: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, rows: Array) -> None:
        """Append rows to an array; all of its parts have one type and one width."""
        if self.folder is None:
            self._parts.setdefault(name, []).append(rows)
            return
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.bin").open("wb")
            self._dtypes[name] = rows.dtype
            self._parts[name] = [rows[:0]]
        self._files[name].write(np.ascontiguousarray(rows, dtype=self._dtypes[name]).data)

    def texts(self, name: str, texts: list[str]) -> None:
        """Append texts to an array of their bytes, and their ends to `NAME_ends`."""
        content = [text.encode("utf-8", errors="surrogatepass") for text in texts]
        ends = np.cumsum([len(one) for one in content], dtype=np.int64) + self._ends.get(name, 0)
        self._ends[name] = int(ends[-1]) if texts else self._ends.get(name, 0)
        self.add(name, np.frombuffer(b"".join(content), np.uint8))
        self.add(f"{name}_ends", ends)

    def table(self, about: Mapping[str, Any]) -> Table:
        """Return what was collected in memory."""
        return Table({name: np.concatenate(parts) for name, parts in self._parts.items()}, about)

    def close(self, about: Mapping[str, Any]) -> None:
        """Finish the files, with their digests in one more file."""
        assert self.folder is not None
        described = {}
        for name, file in self._files.items():
            file.close()
            width = self._parts[name][0].shape[1:]
            path = self.folder / f"{name}.bin"
            described[name] = {"dtype": self._dtypes[name].str, "width": list(width), "sha256": digest_of(path)}
        (self.folder / TABLE).write_text(seal({"arrays": described, "about": about}), encoding="utf-8")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def stored(folder: Path, make: Callable[[Writer], Mapping[str, Any]], say: Callable[[str], None]) -> Table:
    """Return the table in `folder`; if it is not there or damaged, `make` fills it first and returns `Table.about`.

    Where that folder may not be read or written, the table is made in memory.

    Raises:
        RunFailed: the disk is full.
    """
    try:
        with writing(folder, "a cache of token ids"):
            return _on_disk(folder, make, say)
    except RunFailed as error:
        if not not_permitted(error):
            raise
        say(f"note: {folder} cannot be used, token ids are kept in memory ({error.__cause__})")
        writer = Writer()
        return writer.table(make(writer))


def _on_disk(folder: Path, make: Callable[[Writer], Mapping[str, Any]], say: Callable[[str], None]) -> Table:
    if (found := _read(folder)) is not None:
        return found
    with locked(folder.parent / "locks" / folder.name):  # another process may be writing it
        if (found := _read(folder)) is not None:
            return found
        if folder.exists():
            say(f"note: {folder} is damaged and is made again")
            shutil.rmtree(folder, ignore_errors=True)
        with staging(folder.parent, folder.name) as staged:
            writer = Writer(staged)
            writer.close(make(writer))
            found = _read(staged)  # its files stay mapped, whatever becomes of the folder
            claim(staged, folder)
        assert found is not None, f"{folder}: damaged while it was written"
        return found


_VERIFIED: dict[Stamp, None] = {}
"""Files whose digests this process has compared."""


def _read(folder: Path) -> Table | None:
    """Return the table of a folder; None if it is not there, or not what was written."""
    try:
        content = (folder / TABLE).read_bytes()
        described = unseal(content.decode("utf-8"))
        arrays = dict(_mapped(folder, described["arrays"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # other errors of the system say nothing about the table
    mark_used(folder / TABLE)
    return Table(arrays, described["about"], sha256(content).hexdigest())


def _mapped(folder: Path, described: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    for name, one in described.items():
        path = folder / f"{name}.bin"
        seen = stamp([path])
        if seen is None or seen not in _VERIFIED:
            if digest_of(path) != one["sha256"]:
                raise ValueError(f"{path} was changed")
            if seen is not None:
                _VERIFIED[seen] = None
        dtype, width = np.dtype(one["dtype"]), tuple(one["width"])
        row = dtype.itemsize * int(np.prod(width, dtype=np.int64))
        rows = path.stat().st_size // row
        # A plain array is faster to read piece by piece than numpy's class for files.
        shape = (rows, *width)
        yield name, np.asarray(np.memmap(path, dtype, "r", shape=shape)) if rows else np.empty(shape, dtype)
