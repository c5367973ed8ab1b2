"""Read local files into rows, each with its `file:line`, and faults for what cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rlhf_pipeline.disk.decoding import (
    UTF8_MARK,
    BadJsonError,
    bad_json,
    decode_json,
    elements,
    not_utf8,
    refuse_encoding,
)
from rlhf_pipeline.errors import DataError, Fault, first_line

PIECE = 1 << 20  # bytes of a file that are read at once
CSV_LISTS = ("completions", "ranks", "scores", "messages", "conversations", "answers", "info", "summaries")
CSV_NUMBERS = (
    *("label_probability", "labels", "choice", "better_response_id", "helpfulness"),
    *("overall_preference", "preference_strength", "preference"),
)
CSV_FLAGS = {"true": True, "1": True, "false": False, "0": False}

Row = tuple[str, dict[str, Any]]
"""Where a row is, and its columns."""
Rows = list[Row]
_PLACE = re.compile(r"(.*):([0-9]+)(?: \((?:row|prompt) ([0-9]+)\))?", re.DOTALL)


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be used: the short name of the reason, and the fault for the user."""

    reason: str
    fault: Fault
    split: str | None = None  # the row's split, if the source names one


def row_fault(where: str, reason: str, found: str, expected: str = "", fix: str = "") -> RowFault:
    """Return a row fault whose text begins with its reason."""
    return RowFault(reason, Fault(where, f"{reason}: {found}", expected, fix))


def by_line(faults: Sequence[RowFault]) -> list[RowFault]:
    """Return faults in the order of their rows; files and splits keep the order in which they first occur."""
    first: dict[str, int] = {}

    def place(item: RowFault) -> tuple[int, int, int]:
        match = _PLACE.fullmatch(item.fault.where)
        name, line, row = match.groups() if match else (item.fault.where, "0", None)
        return first.setdefault(name, len(first)), int(line), int(row or 0)

    return sorted(faults, key=place)


def read_file(path: Path, name: str | None = None) -> tuple[Rows, list[RowFault]]:
    """Read .jsonl, .json, .csv (each also with .gz) or .parquet; messages use `name` instead of the path.

    Raises:
        DataError: the whole file cannot be read: unknown suffix, truncated or damaged archive.
    """
    name = name or str(path)
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        return _parquet(path, name)
    readers = {"jsonl": _json_lines, "json": _json, "csv": _csv}
    if suffix not in readers:
        raise DataError(Fault(name, f"unknown kind of file {path.name!r}", "one of .jsonl[.gz], .json, .csv, .parquet"))
    return readers[suffix](_content(path, name), name)


def _content(path: Path, name: str) -> bytes:
    return b"".join(_pieces(path, name))


def _pieces(path: Path, name: str) -> Iterator[bytes]:
    """Yield the content of a file, unpacked if it is an archive.

    Raises:
        DataError: it cannot be read, is a damaged archive, or is in UTF-16 or UTF-32.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"  # by content, so that a plain file named .gz is read as well
            file.seek(0)
            stream: IO[bytes] = gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[assignment]
            line, first = 1, True
            try:
                while piece := stream.read(PIECE):
                    if first:
                        refuse_encoding(piece, name)
                    first = False
                    yield piece
                    line += packed and piece.count(b"\n")
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                where, found = f"{name}:{line}", f"damaged or cut gzip file ({error})"
                raise DataError(Fault(where, found, "a whole archive", "fetch the file again")) from error
    except OSError as error:
        raise DataError(Fault(name, f"cannot be read: {error.strerror}")) from error


@dataclass
class JsonLines:
    """The rows of a file of JSON lines, read again at every pass.

    faults: the lines that are no rows, of the last pass.
    """

    path: Path
    name: str
    faults: list[RowFault] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        rows: Rows = []
        self.faults = []
        for number, line, is_last in _lines(_pieces(self.path, self.name)):
            _read_line(rows, self.faults, f"{self.name}:{number}", line, is_last)
            if rows:
                yield rows.pop()


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Yield the lines of a file without their ends: number, line, and whether the file ends within it."""
    number, rest, first = 0, [b""], True
    for piece in pieces:
        if first:
            piece, first = piece.removeprefix(UTF8_MARK), False
        begun, *lines = piece.split(b"\n")
        rest.append(begun)
        if lines:
            number += 1
            yield number, b"".join(rest), False
            for line in lines[:-1]:
                number += 1
                yield number, line, False
            rest = [lines[-1]]
    yield number + 1, b"".join(rest), True


def _json_lines(content: bytes, name: str) -> tuple[Rows, list[RowFault]]:
    rows: Rows = []
    faults: list[RowFault] = []
    for number, line, is_last in _lines([content]):
        _read_line(rows, faults, f"{name}:{number}", line, is_last)
    return rows, faults


def _read_line(rows: Rows, faults: list[RowFault], where: str, line: bytes, is_last: bool) -> None:
    if not line.strip():
        return
    text = ""
    try:
        text = line.decode("utf-8")
        row = decode_json(text)
    except UnicodeDecodeError as error:
        faults.append(row_fault(where, "not_utf8", not_utf8(line, error.start), "UTF-8"))
    except (ValueError, RecursionError) as error:
        bad = bad_json(error, text)
        # The last line of a complete file ends in a newline, or is complete itself.
        cut = is_last and bad.reason == "bad_json"
        found = f"{bad.found}; the file ends within this row" if cut else bad.found
        faults.append(row_fault(where, bad.reason, found, bad.expected, "fetch the file again" if cut else ""))
    else:
        _keep(rows, faults, where, row)


def _keep(rows: Rows, faults: list[RowFault], where: str, row: Any) -> None:
    if isinstance(row, dict):
        rows.append((where, row))
    elif isinstance(row, BadJsonError):
        faults.append(row_fault(where, row.reason, row.found, row.expected))
    else:
        faults.append(row_fault(where, "wrong_type", f"a {type(row).__name__}", "a JSON object"))


def _json(content: bytes, name: str) -> tuple[Rows, list[RowFault]]:
    content = content.removeprefix(UTF8_MARK)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(Fault(f"{name}:{line}", f"not_utf8: {not_utf8(content, error.start)}", "UTF-8")) from error
    if not text.lstrip().startswith("["):
        return _json_lines(content, name)  # many tools write JSON lines under this suffix
    rows: Rows = []
    faults: list[RowFault] = []
    line, before, counted = 1, 0, 0
    for number, (start, value) in enumerate(elements(text, name), 1):
        line += text.count("\n", counted, start)
        where = f"{name}:{line}" if line > before else f"{name}:{line} (row {number})"
        before, counted = line, start
        _keep(rows, faults, where, value)
    return rows, faults


def _csv(content: bytes, name: str) -> tuple[Rows, list[RowFault]]:
    # Bytes that are not UTF-8 become lone surrogates, which the check of each text reports with its line.
    text = content.removeprefix(UTF8_MARK).decode("utf-8", errors="surrogateescape")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(Fault(f"{name}:{line}", "not CSV: a NUL byte", "CSV with a header", "fetch the file again"))
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: Rows = []
    faults: list[RowFault] = []
    line = 1
    try:
        _refuse_twice([column for column in reader.fieldnames or () if column], f"{name}:1")
        line = reader.line_num + 1
        for row in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if None in row:
                faults.append(row_fault(where, "wrong_type", "more fields than the header has", "one per column"))
                continue
            try:
                rows.append((where, {column: _cell(column, cell) for column, cell in row.items()}))
            except BadJsonError as bad:
                faults.append(row_fault(where, bad.reason, bad.found, bad.expected))
    except csv.Error as error:
        # An unclosed quote takes in all that follows, so the error names the row with the quote.
        found = "a quote in this row is never closed" if "end of data" in str(error) else str(error)
        raise DataError(Fault(f"{name}:{line}", f"not CSV: {found}", "CSV with a header")) from error
    return rows, faults


def _refuse_twice(columns: Sequence[str], where: str) -> None:
    for column in dict.fromkeys(columns):
        if columns.count(column) > 1:
            raise DataError(Fault(where, f"duplicate_key: two columns {column!r}", "each column once", "rename one"))


def _cell(column: str, cell: str | None) -> Any:
    """Read lists, flags and numbers, which CSV stores as text."""
    if cell is None:
        return None
    if column.endswith("ended"):
        return CSV_FLAGS.get(cell.strip().lower(), cell or None)
    if column in CSV_LISTS or column.endswith("_ids"):
        try:
            return decode_json(cell)
        except (ValueError, RecursionError) as error:
            if not cell.lstrip().startswith(("[", "{")):
                return cell or None
            bad = bad_json(error, cell)
            raise BadJsonError(bad.reason, f"in {column!r}: {bad.found}", "a JSON list") from error
    if column in CSV_NUMBERS or column.startswith(("score_", "rating_")) or column.endswith(("_score", "_rating")):
        try:
            return float(cell)
        except ValueError:
            return cell or None
    return cell


def _parquet(path: Path, name: str) -> tuple[Rows, list[RowFault]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(Fault(name, f"not a Parquet file, or a cut one ({first_line(error)})", "Parquet")) from error
    _refuse_twice(table.column_names, name)
    rows: Rows = []
    faults: list[RowFault] = []
    for number in range(table.num_rows):
        where = f"{name}:{number + 1}"
        try:
            rows.append((where, table.slice(number, 1).to_pylist()[0]))
        except UnicodeDecodeError:
            faults.append(row_fault(where, "not_utf8", "a text that is not UTF-8", "UTF-8"))
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a date beyond Python's, a field twice
            faults.append(row_fault(where, "wrong_type", first_line(error), "text, numbers and lists"))
    return rows, faults
