"""Read local files into rows, each with its `file:line`, and faults for what cannot be read."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
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
PARQUET_ROWS = 1024  # rows of a Parquet file that are read at once
CSV_LISTS = ("completions", "ranks", "scores", "messages", "conversations", "answers", "info", "summaries")
CSV_NUMBERS = (
    *("label_probability", "margin", "labels", "choice", "better_response_id", "helpfulness"),
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
    """Read a file whole: the rows of `rows_in`, and the faults."""
    faults: list[RowFault] = []
    return list(rows_in(path, name or str(path), faults)), faults


def rows_in(path: Path, name: str, faults: list[RowFault]) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json, .csv (each also with .gz) or .parquet file, which is read as a stream.

    Args:
        name: in place of the path in messages. faults: gets one for each row that cannot be read.

    Raises:
        DataError: the whole file cannot be read: unknown suffix, truncated or damaged archive.
    """
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        return _parquet(path, name, faults)
    readers = {"jsonl": _json_lines, "json": _json, "csv": _csv}
    if suffix not in readers:
        raise DataError(Fault(name, f"unknown kind of file {path.name!r}", "one of .jsonl[.gz], .json, .csv, .parquet"))
    return readers[suffix](_pieces(path, name), name, faults)


@dataclass
class Passes:
    """Rows that are read anew at every pass over them.

    read: reads them once, and adds a fault for each row that cannot be read. faults: those of the last pass.
    """

    read: Callable[[list[RowFault]], Iterator[Row]]
    faults: list[RowFault] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        self.faults = []
        return self.read(self.faults)


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


def _json_lines(pieces: Iterable[bytes], name: str, faults: list[RowFault]) -> Iterator[Row]:
    for number, line, is_last in _lines(pieces):
        if not line.strip():
            continue
        where, text = f"{name}:{number}", ""
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
            if _is_row(row, where, faults):
                yield where, row


def _is_row(value: Any, where: str, faults: list[RowFault]) -> bool:
    if isinstance(value, BadJsonError):
        faults.append(row_fault(where, value.reason, value.found, value.expected))
    elif not isinstance(value, dict):
        faults.append(row_fault(where, "wrong_type", f"a {type(value).__name__}", "a JSON object"))
    return isinstance(value, dict)


def _json(pieces: Iterable[bytes], name: str, faults: list[RowFault]) -> Iterator[Row]:
    texts, begun = _texts(pieces, name), ""
    while not begun.strip() and (text := next(texts, "")):
        begun += text
    every = chain([begun], texts)
    if not begun.lstrip().startswith("["):  # many tools write JSON lines under this suffix
        yield from _json_lines((text.encode() for text in every), name, faults)
        return
    before = 0
    for number, (line, value) in enumerate(elements(every, name), 1):
        where = f"{name}:{line}" if line > before else f"{name}:{line} (row {number})"
        before = line
        if _is_row(value, where, faults):
            yield where, value


def _texts(pieces: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield the text of a file, piece by piece.

    Raises:
        DataError: it is not UTF-8; names the line and the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, line = 0, 1  # bytes whose text is known, and the line behind it
    for piece in chain(_without_mark(pieces), [b""]):
        begun = len(decoder.getstate()[0])  # bytes of a character whose end is in this piece
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            found = not_utf8(error.object, error.start, before=read)
            raise DataError(Fault(f"{name}:{line}", f"not_utf8: {found}", "UTF-8")) from error
        read += begun + len(piece) - len(decoder.getstate()[0])
        line += text.count("\n")
        if text:
            yield text


def _without_mark(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for number, piece in enumerate(pieces):
        if piece := piece if number else piece.removeprefix(UTF8_MARK):
            yield piece


def _csv(pieces: Iterable[bytes], name: str, faults: list[RowFault]) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    pieces = _without_nul(_without_mark(pieces), name)
    reader = csv.DictReader(_text_lines(pieces), strict=True)
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
                values = {column: _cell(column, cell) for column, cell in row.items()}
            except BadJsonError as bad:
                faults.append(row_fault(where, bad.reason, bad.found, bad.expected))
            else:
                yield where, values
    except csv.Error as error:
        for _ in pieces:  # a NUL byte in the rest says more
            pass
        # An unclosed quote takes in all that follows, so the error names the row with the quote.
        found = "a quote in this row is never closed" if "end of data" in str(error) else str(error)
        raise DataError(Fault(f"{name}:{line}", f"not CSV: {found}", "CSV with a header")) from error


def _without_nul(pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    line = 1
    for piece in pieces:
        if (place := piece.find(b"\0")) >= 0:
            line += piece.count(b"\n", 0, place)
            raise DataError(Fault(f"{name}:{line}", "not CSV: a NUL byte", "CSV with a header", "fetch the file again"))
        line += piece.count(b"\n")
        yield piece


def _text_lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a file with their ends: CR, LF or both.

    Bytes that are not UTF-8 become lone surrogates, which the check of each text reports with its line.
    """
    plain = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder = io.IncrementalNewlineDecoder(plain, translate=False)
    begun: list[str] = []
    for piece in chain(pieces, [b""]):
        for line in io.StringIO(decoder.decode(piece, final=not piece), newline=""):
            begun.append(line)
            if line.endswith(("\n", "\r")):
                yield "".join(begun)
                begun = []
    if begun:
        yield "".join(begun)


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


def _parquet(path: Path, name: str, faults: list[RowFault]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    before = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_twice(file.schema_arrow.names, name)
            for batch in file.iter_batches(PARQUET_ROWS):
                yield from _rows_of(batch, name, before, faults)
                before += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(Fault(name, f"not a Parquet file, or a cut one ({first_line(error)})", "Parquet")) from error


def _rows_of(batch: Any, name: str, before: int, faults: list[RowFault]) -> Iterator[Row]:
    """Yield the rows of a part of a Parquet file; before: the number of rows in front of it."""
    import pyarrow

    try:
        rows = batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError):  # of a single row
        rows = [None] * batch.num_rows
    for number, row in enumerate(rows):
        where = f"{name}:{before + number + 1}"
        try:
            yield where, batch.slice(number, 1).to_pylist()[0] if row is None else row
        except UnicodeDecodeError:
            faults.append(row_fault(where, "not_utf8", "a text that is not UTF-8", "UTF-8"))
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a date beyond Python's, a field twice
            faults.append(row_fault(where, "wrong_type", first_line(error), "text, numbers and lists"))
