"""The records of a source: parsed once in a process, as long as its files do not change.

Those of a large source are in a store of the home directory, so that they are parsed once for all processes.
"""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rlhf_pipeline.data.files import Passes, by_line
from rlhf_pipeline.data.formats import RecordSet, parse_stream
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.rows import Unstorable
from rlhf_pipeline.data.sources import Source, files_of, read_source
from rlhf_pipeline.data.stored import STORES, source_name, stored_records
from rlhf_pipeline.disk.stamps import Stamp, stamp
from rlhf_pipeline.errors import DataError, Fault

Columns = tuple[tuple[str, str], ...]
KEPT_BYTES = 256 << 20
"""Size of the files whose records are kept in memory for the next part of a command that reads them."""
STORED_BYTES = 8 << 20
"""Size of the files of a source from which on its records are stored in the home directory."""


def source_stamp(source: str, home: Path | None) -> Stamp | None:
    """Return the stamp of the files of a source; None where they are on the hub or too new for one."""
    files = files_of(source, home=home)
    return None if files is None else stamp(files)


def parsed_once(
    source: str,
    config: str | None,
    split: str | None,
    columns: Columns,
    home: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> RecordSet:
    """The records of a source, which this process parses again only where its files have changed since.

    Args:
        split: read only this split. columns: the pairs of a `column_mapping`.

    What is returned is the caller's: its lists are copies; records themselves are frozen.
    """

    def read() -> Source:
        return read_source(source, config=config, split=split, home=home, in_passes=True)

    files = files_of(source, home=home)
    loaded = read() if files is None else None  # the hub tells its files when it is loaded
    files = loaded.files if loaded is not None else files or []

    def name() -> str:
        now = files if loaded is not None else files_of(source, home=home) or []
        return source_name(source, now, config, split, columns)

    if home is not None and sum(file.stat().st_size for file in files if file.is_file()) >= STORED_BYTES:
        before = name()
        try:
            folder = home.joinpath(*STORES, before)
            return stored_records(folder, lambda: _unchanged(_parsing(loaded or read(), columns), before, name), say)
        except Unstorable:
            pass  # kept in memory
    if (seen := None if loaded else source_stamp(source, home)) is None:
        return _parse(loaded or read(), columns)
    key = (source, config, split, columns, seen)
    if key in _PARSED:
        _PARSED.move_to_end(key)
    else:
        found = _parse(read(), columns)
        if _size(key) > KEPT_BYTES:
            return found
        for outdated in [known for known in _PARSED if known[:-1] == key[:-1]]:
            del _PARSED[outdated]
        _PARSED[key] = found
        while sum(map(_size, _PARSED)) > KEPT_BYTES:
            _PARSED.popitem(last=False)
    found = _PARSED[key]
    return replace(found, records=list(found.records), faults=list(found.faults), skipped=Counter(found.skipped))


_Key = tuple[str, str | None, str | None, Columns, Stamp]
_PARSED: OrderedDict[_Key, RecordSet] = OrderedDict()  # the one used last at the end


def _size(key: _Key) -> int:
    """Bytes of the files of a parsed source."""
    return sum(file[3] for file in key[-1])


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Let Python's garbage collector rest while rows become records and token ids: many objects that all stay, and that
    it would walk through again and again."""
    resting = not gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not resting:
            gc.enable()


@collector_at_rest()
def _parse(read: Source, columns: Columns) -> RecordSet:
    """Every record of a source and every row that is none.

    Raises:
        DataError: no row can be read, and errors of `read_source`.
    """
    found, records = _parsing(read.whole(), columns)
    found.records = list(records)
    return found


def _unchanged(
    parsing: tuple[RecordSet, Iterator[Record]], before: str, name: Callable[[], str]
) -> tuple[RecordSet, Iterator[Record]]:
    """The same records; behind the last one it is checked that the files still have the name that their store has.

    Raises:
        Unstorable: they were changed meanwhile.
    """
    found, records = parsing

    def checked() -> Iterator[Record]:
        yield from records
        if name() != before:
            raise Unstorable(f"{before}: its files were changed while they were read")

    return found, checked()


def _parsing(read: Source, columns: Columns) -> tuple[RecordSet, Iterator[Record]]:
    """The records of the rows of a source; what is said of all is whole when there are no more of them."""
    if read.records is not None:
        return RecordSet(read.name, read.records[0].kind, len(read.records), []), iter(read.records)
    rows = read.rows
    some = next(iter(rows), None)
    faults = rows.faults if isinstance(rows, Passes) else read.faults
    if faults and some is None:
        raise DataError([Fault(read.name, "no row can be read"), *(item.fault for item in faults)])
    found, records = parse_stream(rows, read.name, dict(columns))
    found.recorded_digest = read.tokenizer_digest

    def whole() -> Iterator[Record]:
        yield from records
        unread = rows.faults if isinstance(rows, Passes) else read.faults
        found.rows += len({item.fault.where for item in unread})
        found.faults = by_line([*unread, *found.faults])

    return found, whole()
