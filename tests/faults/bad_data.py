"""Data files with one thing wrong each, and the place that the message must name."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAIR = {"prompt": "the plot of this drama was", "chosen": "great", "rejected": "dull"}
SHOWN = {"prompt": "the plot of this drama was", "completion": "great"}
RANKED = {"prompt": "the plot of this drama was", "completions": ["great", "dull", "fine"], "ranks": [1, 2, 3]}


@dataclass(frozen=True)
class Bad:
    """A bad file. content: its bytes, or what writes it. place: what stands before the fault. says: words in it."""

    name: str
    file: str
    content: bytes | Callable[[Path], None]
    place: str
    says: tuple[str, ...] = ()
    overrides: tuple[str, ...] = field(default=())

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write it into a folder; returns the words of the command that reads it."""
        path = folder / self.file
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return ("data", "check", str(path))

    def missing(self, folder: Path, said: str) -> str:
        """What is not said of it as it should be: no line with its place, or that line without the words."""
        # Lines that count the faults of a whole file, or say of it what is no fault.
        count = ("rows cannot be used", "no rows left", "repeat an earlier one")
        named = [
            line
            for line in said.splitlines()
            if str(folder / self.place) in line and not any(words in line for words in count)
        ]
        if not named:
            return f"{folder / self.place} is not named: {said[-2000:]}"
        return "" if all(word in named[0] for word in self.says) else f"{self.says} not in {named[0]}"


def lines(*rows: Any) -> bytes:
    """JSON lines; a row that is bytes already stays as it is."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def _row(name: str, row: Any, *says: str, good: Any = PAIR) -> Bad:
    """A bad second row between good ones."""
    return Bad(name, "rows.jsonl", lines(good, row, good), "rows.jsonl:2", says)


def _without(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != column}


def _turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "great"} for role in roles]


TALK = {"messages": _turns("user", "assistant")}

ROW_FAULTS = [
    _row("null", {**PAIR, "rejected": None}, "null", "'rejected'"),
    _row("missing column", _without(PAIR, "chosen"), "missing_column", "'chosen'"),
    _row("misspelt column", {"promt": "a", "chosen": "b", "rejected": "c"}, "missing_column", "'prompt'", "promt"),
    _row("number for text", {**PAIR, "chosen": 3}, "wrong_type", "'chosen' is a number"),
    _row("true for text", {**PAIR, "chosen": True}, "wrong_type", "true or false"),
    _row("object for text", {**PAIR, "prompt": {"text": "a"}}, "wrong_type", "an object"),
    _row("list of text for text", {**PAIR, "rejected": ["dull"]}, "wrong_type", "a list"),
    _row("empty list", {**PAIR, "rejected": []}, "wrong_type", "an empty list"),
    _row("empty response", {**PAIR, "chosen": ""}, "empty_completion", "'chosen'"),
    _row("response of white space", {**PAIR, "rejected": " \t\n"}, "empty_completion", "'rejected'"),
    _row("empty prompt", {**PAIR, "prompt": ""}, "empty_prompt", "is empty"),
    _row("prompt of white space", {**PAIR, "prompt": " \n"}, "empty_prompt", "white space"),
    _row("identical sides", {**PAIR, "rejected": "great"}, "identical_pair"),
    _row("probability above 1", {**PAIR, "label_probability": 1.5}, "wrong_type", "label_probability", "0 to 1"),
    _row("probability as text", {**PAIR, "label_probability": "high"}, "wrong_type", "label_probability"),
    _row("probability too large to hold", {**PAIR, "label_probability": 10**400}, "wrong_type", "out of range"),
    _row("margin as text", {**PAIR, "margin": "wide"}, "wrong_type", "'margin' is text", "a number"),
    _row("margin too large to hold", {**PAIR, "margin": 10**400}, "wrong_type", "out of range", "a finite number"),
    _row("margin that is NaN", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "bad_json", "NaN"),
    _row("flag that is a number", {**PAIR, "chosen_ended": 1}, "wrong_type", "'chosen_ended'"),
    _row("split that is a number", {**PAIR, "split": 3}, "wrong_type", "'split'"),
    _row("half a surrogate pair", b'{"prompt": "a", "chosen": "b\\ud83d", "rejected": "c"}', "not_utf8", "U+D83D"),
    _row("half a pair as split", b'{"prompt": "a", "chosen": "b", "rejected": "c", "split": "\\ud800"}', "not_utf8"),
    _row("token ids that are text", {**PAIR, "prompt_ids": ["a"], "chosen_ids": [1], "rejected_ids": [2]}, "token ids"),
    _row("negative token id", {**PAIR, "prompt_ids": [-1], "chosen_ids": [1], "rejected_ids": [2]}, "token ids"),
    _row("token ids of one side", {**PAIR, "prompt_ids": [1], "chosen_ids": [1]}, "rejected_ids"),
    _row("duplicate key", b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "duplicate_key", "chosen"),
    _row("NaN", b'{"prompt": "a", "chosen": "b", "rejected": "c", "score": NaN}', "bad_json", "NaN"),
    _row("Infinity", b'{"prompt": "a", "chosen": "b", "rejected": "c", "score": -Infinity}', "bad_json", "-Infinity"),
    _row("number of 5000 digits", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "bad_json", "digits"),
    _row("deep nesting", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json", "nested too deeply"),
    _row("deep nesting of objects", b'{"a": ' * 100_000, "bad_json", "nested too deeply"),
    _row("half a row", b'{"prompt": "a", "chosen": "b', "bad_json"),
    _row("two rows on one line", b'{"prompt": "a"} {"prompt": "b"}', "bad_json", "Extra data"),
    _row("single quotes", b"{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}", "bad_json"),
    _row("trailing comma", b'{"prompt": "a", "chosen": "b", "rejected": "c",}', "bad_json"),
    _row("list for a row", ["a", "b"], "wrong_type", "a list"),
    _row("NUL byte", b'{"prompt": "a\0", "chosen": "b", "rejected": "c"}', "bad_json", "NUL"),
    _row("block of NUL bytes", b"\0" * 512, "bad_json", "NUL"),
    _row("Latin-1 byte", '{"prompt": "café", "chosen": "b", "rejected": "c"}'.encode("latin-1"), "not_utf8", "0xe9"),
    _row("bytes of UTF-8 cut", '{"prompt": "café'.encode()[:-1], "not_utf8"),
    _row("10 MB line that is no JSON", b'{"prompt": "' + b"a " * 5_000_000, "bad_json"),
    _row("10 MB of quotes", b'"' * 10_000_000, "bad_json"),
    _row("10 MB response of white space", {**PAIR, "chosen": " " * 10_000_000}, "empty_completion"),
    _row("ranking of one", {**RANKED, "completions": ["great"], "ranks": [1]}, "two or more", good=RANKED),
    _row("ranks too few", {**RANKED, "ranks": [1, 2]}, "'ranks'", good=RANKED),
    _row("rank that is text", {**RANKED, "ranks": [1, 2, "3"]}, "ranks[2]", good=RANKED),
    _row("completion of a ranking null", {**RANKED, "completions": ["a", None, "b"]}, "completions[1]", good=RANKED),
    _row("turn without content", {"messages": [{"role": "user"}, *_turns("assistant")]}, "no 'content'", good=TALK),
    _row("turn of a number", {"messages": [{"role": "user", "content": 3}]}, "'content'", good=TALK),
    _row("ends with the user", {"messages": _turns("assistant", "user")}, "no_assistant_turn", good=TALK),
    _row("one turn", {"messages": _turns("assistant")}, "empty_prompt", "one turn", good=TALK),
    _row("messages that are text", {"messages": "hello"}, "'messages' is text", good=TALK),
    _row("duplicate key in a turn", b'{"messages": [{"role": "user", "role": "user"}]}', "duplicate_key", good=TALK),
    _row("HH without a reply", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "no_assistant_turn", good={
        "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    _row("nothing in common", {"chosen": "abc", "rejected": "xyz"}, "prompts_differ", good={
        "chosen": "one prompt, one end", "rejected": "one prompt, another end"}),
]  # fmt: skip


def _splits(train: str, test: str) -> bytes:
    row = {"chosen": "great", "rejected": "dull"}
    return lines({**row, "prompt": "another film", "split": "train"}, {**row, "prompt": train, "split": "train"},
                 {"prompt": test, "chosen": "fine", "rejected": "poor", "split": "test"})  # fmt: skip


def _same_row() -> bytes:
    return lines({**PAIR, "prompt": "b", "split": "train"}, {**PAIR, "split": "train"}, {**PAIR, "split": "test"})


OVERLAPS = [
    Bad("prompt of train in test", "rows.jsonl", _splits("the plot was", "the plot was"), "rows.jsonl:3", (
        "leaked_prompt", "rows.jsonl:2")),
    Bad("row of train in test", "rows.jsonl", _same_row(), "rows.jsonl:3", ("leaked_row", "rows.jsonl:2")),
    Bad("prompt in other letters", "rows.jsonl", _splits("The plot was:", "the  plot was"), "rows.jsonl:3", (
        "leaked_similar_prompt", "rows.jsonl:2")),
    Bad("some rows without a split", "rows.jsonl", lines({**PAIR, "split": "train"},
        {**PAIR, "prompt": "b", "split": "test"}, {**PAIR, "prompt": "c"}), "rows.jsonl:3", ("no split",)),
]  # fmt: skip

ARRAY = json.dumps([PAIR] * 5, indent=1).encode()
MANY = lines(*({**PAIR, "prompt": f"film {i * 7919 % 10007}"} for i in range(400)))
TABLE = b"prompt,chosen,rejected\r\nthe plot was,great,dull\r\n"


def _parquet(cut: int | None = None, **columns: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns or {key: [value] * 50 for key, value in PAIR.items()}), stream)
    return stream.getvalue()[:cut]


def _saved(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import datasets

        datasets.Dataset.from_list([PAIR] * 20).save_to_disk(path)
        damage(path)

    return write


def _first(path: Path, pattern: str) -> Path:
    return next(path.glob(pattern))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WHOLE_FILES = [
    Bad("last row cut", "rows.jsonl", lines(PAIR, PAIR) + b'{"prompt": "the pl', "rows.jsonl:3", ("ends within",)),
    Bad("empty file", "rows.jsonl", b"", "rows.jsonl", ("no rows",)),
    Bad("blank lines alone", "rows.jsonl", b"\n \n\r\n", "rows.jsonl", ("no rows",)),
    Bad("unknown columns", "rows.jsonl", lines({"question": "a", "answer": "b"}), "rows.jsonl", ("answer, question",)),
    Bad("UTF-16 with its mark", "rows.jsonl", lines(PAIR).decode().encode("utf-16"), "rows.jsonl:1", ("like UTF-16",)),
    Bad("UTF-16 without a mark", "rows.jsonl", lines(PAIR).decode().encode("utf-16-le"), "rows.jsonl:1", ("UTF-16",)),
    Bad("UTF-32 with its mark", "rows.csv", TABLE.decode().encode("utf-32"), "rows.csv:1", ("looks like UTF-32",)),
    Bad("UTF-32 without a mark", "rows.json", ARRAY.decode().encode("utf-32-be"), "rows.json:1", ("UTF-32",)),
    Bad("UTF-16 in an archive", "rows.jsonl.gz", gzip.compress(lines(PAIR).decode().encode("utf-16")),
        "rows.jsonl.gz:1", ("UTF-16",)),
    Bad("array in Latin-1", "rows.json", '[\n{"prompt": "é"}]'.encode("latin-1"), "rows.json:2", ("not_utf8", "0xe9")),
    Bad("array cut", "rows.json", ARRAY[:-40], "rows.json:", ("bad_json",)),
    Bad("array cut between rows", "rows.json", b'[{"prompt": "a"},\n', "rows.json:2", ("bad_json",)),
    Bad("array without a comma", "rows.json", b'[{"prompt": "a"}\n{"prompt": "b"}]', "rows.json:2", ("missing",)),
    Bad("text after the array", "rows.json", b'[{"prompt": "a"}]\nx', "rows.json:", ("more text",)),
    Bad("duplicate key in an array", "rows.json", b'[{"prompt": "a"},\n{"prompt": "b", "prompt": "c"}]',
        "rows.json:2", ("duplicate_key", "'prompt'")),
    Bad("NaN in an array", "rows.json", b'[{"prompt": "a"},\n{"prompt": "b", "x": NaN}]', "rows.json:2", ("NaN",)),
    Bad("deep nesting in an array", "rows.json", b"[\n" + b"[" * 100_000, "rows.json:2", ("nested too deeply",)),
    Bad("an object for an array", "rows.json", b'{\n "prompt": ["a"]\n}', "rows.json:1", ("bad_json",)),
    Bad("archive cut", "rows.jsonl.gz", gzip.compress(MANY)[:-200], "rows.jsonl.gz:", ("damaged or cut gzip",)),
    Bad("archive cut in its header", "rows.jsonl.gz", gzip.compress(MANY)[:6], "rows.jsonl.gz:1", ("gzip",)),
    Bad("archive with another checksum", "rows.jsonl.gz", gzip.compress(MANY)[:-8] + b"\0" * 8, "rows.jsonl.gz:",
        ("gzip",)),
    Bad("archive with more behind it", "rows.csv.gz", gzip.compress(TABLE) + b"more", "rows.csv.gz:", ("gzip",)),
    Bad("CSV with a quote never closed", "rows.csv", TABLE + b'"the plot was,fine,poor\r\nb,c,d\r\n', "rows.csv:3", (
        "never closed",)),
    Bad("CSV with text after a quote", "rows.csv", TABLE + b'"a"b,c,d\r\n', "rows.csv:3", ("not CSV",)),
    Bad("CSV with a field too many", "rows.csv", TABLE + b"a,b,c,d\r\n", "rows.csv:3", ("more fields",)),
    Bad("CSV with a field too few", "rows.csv", TABLE + b"a,b\r\n", "rows.csv:3", ("null", "'rejected'")),
    Bad("CSV with a column twice", "rows.csv", b"prompt,chosen,chosen\na,b,c\n", "rows.csv:1", ("two columns",)),
    Bad("CSV with a NUL byte", "rows.csv", TABLE + b"a,b\0,c\r\n", "rows.csv:3", ("NUL",)),
    Bad("CSV in Latin-1", "rows.csv", TABLE + "café,b,c\r\n".encode("latin-1"), "rows.csv:3", ("not_utf8", "0xe9")),
    Bad("CSV with a list cut", "rows.csv", b'prompt,completions,ranks\na,"[""b"", ""c""","[1, 2]"\n', "rows.csv:2", (
        "bad_json", "'completions'")),
    Bad("CSV with a deep list", "rows.csv", b"prompt,completions,ranks\na," + b"[" * 100_000 + b',"[1]"\n',
        "rows.csv:2", ("nested too deeply",)),
    Bad("CSV of a header", "rows.csv", b"prompt,chosen,rejected\n", "rows.csv", ("no rows",)),
    Bad("CSV with semicolons", "rows.csv", b"prompt;chosen;rejected\na;b;c\n", "rows.csv", ("prompt;chosen;rejected",)),
    Bad("Parquet cut", "rows.parquet", _parquet(-20), "rows.parquet", ("Parquet",)),
    Bad("Parquet cut in the middle", "rows.parquet", _parquet(300), "rows.parquet", ("Parquet",)),
    Bad("Parquet that is text", "rows.parquet", TABLE, "rows.parquet", ("Parquet",)),
    Bad("Parquet with a null", "rows.parquet", _parquet(prompt=["a", "b"], chosen=["c", None], rejected=["d", "e"]),
        "rows.parquet:2", ("null", "'chosen'")),
    Bad("Parquet with numbers", "rows.parquet", _parquet(prompt=["a"], chosen=[1.5], rejected=["e"]),
        "rows.parquet:1", ("wrong_type",)),
    Bad("saved data without their table", "saved", _saved(lambda path: _first(path, "*.arrow").unlink()), "saved", (
        ".arrow",)),
    Bad("saved data with half a table", "saved", _saved(lambda path: _cut(_first(path, "*.arrow"))), "saved"),
    Bad("saved data without their state", "saved", _saved(lambda path: (path / "state.json").unlink()), "saved", (
        "datasets",)),
    Bad("saved data with half a state", "saved", _saved(lambda path: _cut(path / "state.json")), "saved"),
    Bad("empty folder", "saved", lambda path: path.mkdir(), "saved", ("datasets",)),
    Bad("unknown suffix", "rows.txt", lines(PAIR), "rows.txt", ("unknown kind of file",)),
]  # fmt: skip

BAD = [*ROW_FAULTS, *OVERLAPS, *WHOLE_FILES]
