"""Local files to rows, each with its `file:line`, and what could not be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import DataError, Fault

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".gz")
CSV_LISTS = ("completions", "ranks", "scores", "messages", "conversations")
CSV_FLAGS = {"true": True, "1": True, "false": False, "0": False}

Rows = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be used: the short name of the reason, and the fault to show."""

    reason: str
    fault: Fault


def row_fault(where: str, reason: str, found: str, expected: str = "", fix: str = "") -> RowFault:
    """Return a row fault whose text begins with its reason."""
    return RowFault(reason, Fault(where, f"{reason}: {found}", expected, fix))


def read_file(path: Path, name: str | None = None) -> tuple[Rows, list[RowFault]]:
    """Read .jsonl, .json, .csv (each also with .gz) or .parquet; messages say `name` for the path.

    Raises:
        DataError: the file as a whole cannot be read: unknown suffix, cut or damaged archive.
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
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(Fault(name, f"cannot be read: {error.strerror}")) from error
    if raw[:2] != b"\x1f\x8b":  # by content, so that a plain file named .gz is read as well
        return raw
    content = bytearray()
    try:
        with gzip.open(io.BytesIO(raw)) as stream:
            while piece := stream.read(1 << 20):
                content += piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        line = content.count(b"\n") + 1
        raise DataError(
            Fault(
                f"{name}:{line}",
                f"damaged or cut gzip file ({error})",
                "a whole archive",
                "fetch the file again",
            )
        ) from error
    return bytes(content)


def _json_lines(content: bytes, name: str) -> tuple[Rows, list[RowFault]]:
    rows: Rows = []
    faults: list[RowFault] = []
    decode = json.JSONDecoder().decode
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            row = decode(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            faults.append(row_fault(where, "not_utf8", f"byte {error.start + 1} is not UTF-8", "UTF-8"))
        except json.JSONDecodeError as error:
            faults.append(row_fault(where, "bad_json", f"{error.msg} at column {error.colno}", "one JSON object"))
        except (ValueError, RecursionError) as error:  # a number of too many digits; nested too deeply
            faults.append(row_fault(where, "bad_json", type(error).__name__, "one JSON object"))
        else:
            _keep(rows, faults, where, row)
    return rows, faults


def _keep(rows: Rows, faults: list[RowFault], where: str, row: Any) -> None:
    if isinstance(row, dict):
        rows.append((where, row))
    else:
        faults.append(row_fault(where, "wrong_type", f"a {type(row).__name__}", "a JSON object"))


def _json(content: bytes, name: str) -> tuple[Rows, list[RowFault]]:
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = f"byte {error.start + 1} of the file is not UTF-8"
        raise DataError(Fault(f"{name}:{line}", f"not_utf8: {found}", "UTF-8")) from error
    if not text.lstrip().startswith("["):
        return _json_lines(content, name)  # many tools write JSON lines under this suffix
    rows: Rows = []
    faults: list[RowFault] = []
    line, counted = 1, 0
    for start, value in _elements(text, name):
        line += text.count("\n", counted, start)
        counted = start
        _keep(rows, faults, f"{name}:{line}", value)
    return rows, faults


def _elements(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Yield each element of a JSON array with its position, which `json.loads` would not tell."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    try:
        while text[position : position + 1] != "]":
            value, end = decoder.raw_decode(text, position)
            yield position, value
            position = _skip_space(text, end)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("',' or ']' missing", text, position)
        if _skip_space(text, position + 1) != len(text):
            raise json.JSONDecodeError("more text after the array", text, position)
    except (ValueError, RecursionError) as error:
        # What follows a syntax error cannot be told apart into rows, so the file as a whole is refused.
        line = getattr(error, "lineno", text.count("\n", 0, position) + 1)
        found = getattr(error, "msg", type(error).__name__)
        raise DataError(Fault(f"{name}:{line}", f"bad_json: {found}", "an array of objects")) from error


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _csv(content: bytes, name: str) -> tuple[Rows, list[RowFault]]:
    # Bytes that are not UTF-8 become lone surrogates, which the check of each text reports with its line.
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: Rows = []
    faults: list[RowFault] = []
    try:
        line = 2
        for row in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if None in row:
                faults.append(row_fault(where, "wrong_type", "more fields than the header has", "one per column"))
            else:
                rows.append((where, {column: _cell(column, cell) for column, cell in row.items()}))
    except csv.Error as error:
        raise DataError(Fault(f"{name}:{reader.line_num}", f"not CSV: {error}", "CSV with a header")) from error
    return rows, faults


def _cell(column: str, cell: str | None) -> Any:
    """Read lists, flags and numbers that CSV can hold only as text."""
    if cell is None:
        return None
    if column.endswith("ended"):
        return CSV_FLAGS.get(cell.strip().lower(), cell or None)
    if column in CSV_LISTS or column.endswith("_ids"):
        try:
            return json.loads(cell)
        except ValueError:
            return cell or None
    if column == "label_probability":
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
        raise DataError(Fault(name, f"not a Parquet file ({str(error).splitlines()[0]})", "Parquet")) from error
    rows: Rows = []
    faults: list[RowFault] = []
    for number in range(table.num_rows):
        where = f"{name}:{number + 1}"
        try:
            rows.append((where, table.slice(number, 1).to_pylist()[0]))
        except UnicodeDecodeError:
            faults.append(row_fault(where, "not_utf8", "a text that is not UTF-8", "UTF-8"))
    return rows, faults
