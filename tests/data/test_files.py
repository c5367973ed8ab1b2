"""Files are read as streams: in whatever pieces they come, the rows and faults are those of the whole file."""

from __future__ import annotations

import datetime
import gzip
import json

import pytest

from rlhf_pipeline.data import files
from rlhf_pipeline.errors import DataError

ROWS = [
    {"text": 'a "quoted" \\ text'},
    {"text": "é漢字\u2028🙂", "n": [1, -2.5e-3, None, {"x": []}]},
    {"text": "two\nlines\r\n", "empty": ""},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
CASES = {
    "lines.jsonl": LINES + b"\n",
    "faults.jsonl": b'{"a": 1\n\n[2]\n' + LINES + b'\n{"b": "\xff"}\n{"a": 1, "a": 2}\n{"cut": "of',
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "lines.json": b"\xef\xbb\xbf \n" + LINES,
    "bytes.json": LINES + b'\n{"text": "\xc3("}\n' + LINES,
    "empty.json": b" \n ",
    "array.json": b"\xef\xbb\xbf\n\n " + ARRAY + b" \n\n",
    "flat.json": json.dumps(ROWS).encode(),
    "none.json": b"[ ]",
    "others.json": b'[{"a": 1}, 12345, "text", [1,\n2], null,\n {"a": NaN}, {"a": {"b": 1, "b": 2}}, 1.5e9, -Infinity]',
    "syntax.json": ARRAY[:-2] + b",, ]",
    "missing.json": b'[{"a": 1}\n{"a": 2}]',
    "more.json": b'[{"a": 1}\n]\n [' + b" " * 100 + b"x",
    "cut.json": ARRAY[:-40],
    "comma.json": b'[{"a": 1},\n\n',
    "digits.json": b'[{"a": 1},\n{"n": ' + b"9" * 5000 + b"}, {}]",
    "deep.json": b"[1,\n" + b"[" * 100_000,
    "not_utf8.json": b'[{"a": 1},\n {"a" 2},\n {"a": "' + "é".encode() * 9 + b'\xe9"}]',
    "cut_byte.json": b'[{"a": "\xc3',
    "table.csv": 'prompt,completions\n"two\nlines","[""é"", ""b""]"\r\n"a ""b""",\n漢,[1\n'.encode(),
    "crlf.csv": b"\xef\xbb\xbfprompt,ended\r\na,true\r\n\r\nb,false",
    "cr.csv": b"prompt,ended\ra,1\rb,0\r",
    "bytes.csv": b"prompt,x\nab\xe9\xe2\x82,2\n",
    "more.csv": b"prompt\na\na,b\nc\n",
    "quote.csv": b'prompt,x\na,b\n"c,d\ne,f\n',
    "strict.csv": b'prompt,x\na,"b"c\nd,e\n',
    "nul.csv": b'prompt,x\na,"b"c\nd,e\nf,\0\n',
    "twice.csv": b"prompt,prompt\na,b\n",
    "nothing.csv": b"",
    "packed.csv.gz": gzip.compress(b"prompt,x\na,b\n", mtime=0) + gzip.compress(b"c,d\n", mtime=0),
    "packed.json.gz": gzip.compress(ARRAY, mtime=0),
}


def read(path):
    """The rows and faults of a file, or its error."""
    try:
        return files.read_file(path)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("name", CASES)
def test_pieces_change_nothing(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(CASES[name])
    whole = read(path)
    for size in (3, 4, 7, 64):  # a mark of 3 bytes is looked for in the first piece
        monkeypatch.setattr(files, "PIECE", size)
        assert read(path) == whole, size


@pytest.mark.parametrize(
    "name", ["lines.jsonl", "crlf.jsonl", "lines.json", "array.json", "flat.json", "packed.json.gz"]
)
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_the_rows_are_those_that_were_written(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(files, "PIECE", size)
    (tmp_path / name).write_bytes(CASES[name])
    rows, faults = files.read_file(tmp_path / name)
    assert [row for _, row in rows] == ROWS and faults == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bytes.json", "4: not_utf8: byte {} (0xc3, 'Ã' in Latin-1) is not UTF-8; expected UTF-8"),
        ("syntax.json", "{}: bad_json: Expecting value; expected an array of objects"),
        ("missing.json", "2: bad_json: ',' or ']' missing; expected an array of objects"),
        ("more.json", "2: bad_json: more text after the array; expected an array of objects"),
        ("comma.json", "3: bad_json: Expecting value; expected an array of objects"),
        ("digits.json", "2: bad_json: a number with too many digits; expected an array of objects"),
        ("deep.json", "2: bad_json: nested too deeply; expected an array of objects"),
        # What is not UTF-8 is said before what is no JSON.
        ("not_utf8.json", "3: not_utf8: byte 48 (0xe9, 'é' in Latin-1) is not UTF-8; expected UTF-8"),
        ("nul.csv", "4: not CSV: a NUL byte; expected CSV with a header; fetch the file again"),
        ("quote.csv", "3: not CSV: a quote in this row is never closed; expected CSV with a header"),
    ],
)
def test_what_is_wrong_with_the_whole_file_is_named(tmp_path, monkeypatch, name, said):
    content = CASES[name]
    number = content.index(b"\xc3(") + 1 if name == "bytes.json" else content.count(b"\n") + 1
    monkeypatch.setattr(files, "PIECE", 5)
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == f"{tmp_path / name}:" + said.format(number)


def test_an_array_is_not_held_whole(tmp_path, monkeypatch):
    """The first row is there when the first pieces have been read."""
    monkeypatch.setattr(files, "PIECE", 64)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}] * 1000))
    pieces = []
    monkeypatch.setattr(files, "_pieces", lambda *at, whole=files._pieces: (pieces.append(1) or p for p in whole(*at)))
    rows = files.rows_in(path, "rows.json", [])
    assert next(rows) == ("rows.json:1", {"text": "a"}) and len(pieces) == 1
    assert sum(1 for _ in rows) == 999


def test_rows_of_parquet_are_read_part_by_part(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    days = pyarrow.array([0, 1, 4_000_000, 3, 4], pyarrow.date32())  # beyond Python's last year
    table = pyarrow.table({"text": list("abcde"), "day": days})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=3)
    for size in (1, 2, 1024):
        monkeypatch.setattr(files, "PARQUET_ROWS", size)
        faults: list[files.RowFault] = []
        rows = list(files.rows_in(tmp_path / "rows.parquet", "rows.parquet", faults))
        assert rows == [
            (f"rows.parquet:{n + 1}", {"text": "abcde"[n], "day": datetime.date(1970, 1, 1 + n)}) for n in (0, 1, 3, 4)
        ]
        assert [(item.reason, item.fault.where) for item in faults] == [("wrong_type", "rows.parquet:3")]
