from __future__ import annotations

import gzip
import json
from hashlib import sha256

import pytest

from rlhf_pipeline.data.files import by_line, row_fault
from rlhf_pipeline.data.sources import read_source
from rlhf_pipeline.errors import DamagedFile, DataError, UnknownReference


def values(source) -> list[dict]:
    return [row for _, row in source.rows]


def places(source) -> list[str]:
    return [where.rpartition("/")[2] for where, _ in source.rows]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_keep_their_line_numbers(jsonl, name):
    source = read_source(jsonl({"text": "a"}, "", {"text": "b"}, name=name))
    assert values(source) == [{"text": "a"}, {"text": "b"}]
    assert places(source) == [f"{name}:1", f"{name}:3"]


def test_every_unreadable_line_is_reported_with_its_line(jsonl):
    deep = "[" * 100_000
    lines = ['{"text": "a"', "3", '{"text": "\udcff"}', '{"text": "b"}', deep, '{"n": ' + "9" * 5000 + "}"]
    source = read_source(jsonl(*lines))
    found = [(item.fault.where.rpartition(":")[2], item.reason) for item in source.faults]
    assert found == [
        ("1", "bad_json"),
        ("2", "wrong_type"),
        ("3", "not_utf8"),
        ("5", "bad_json"),
        ("6", "bad_json"),
    ]
    assert values(source) == [{"text": "b"}]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert values(read_source(str(tmp_path / "rows.jsonl"))) == [{"text": "a"}]


def test_a_cut_archive_is_refused_with_its_line(tmp_path):
    rows = "".join(json.dumps({"text": sha256(bytes([i])).hexdigest()}) + "\n" for i in range(200))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(rows.encode(), mtime=0)[:-2000])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:\d+: damaged or cut gzip"):
        read_source(str(path))


def test_a_json_array_keeps_lines_and_notes_what_is_no_object(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"text":\n   "a"},\n  7,\n  {"text": "b"}\n]\n')
    source = read_source(str(path))
    assert places(source) == ["rows.json:2", "rows.json:5"]
    assert [str(item.fault).rpartition("/")[2] for item in source.faults] == [
        "rows.json:4: wrong_type: a int; expected a JSON object"
    ]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1}] x', "[{]"])
def test_a_broken_json_array_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=r"rows\.json:1: bad_json"):
        read_source(str(tmp_path / "rows.json"))


def test_csv_reads_lists_and_flags_and_counts_lines_within_quotes(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completions,scores,ended\n"two\nlines","[""a"", ""b""]","[1, 2]",true\nb,,,\nc,d\n')
    source = read_source(str(path))
    assert places(source) == ["rows.csv:2", "rows.csv:4", "rows.csv:5"]
    first, second, third = values(source)
    assert first == {"prompt": "two\nlines", "completions": ["a", "b"], "scores": [1, 2], "ended": True}
    assert second == {"prompt": "b", "completions": None, "scores": None, "ended": None}
    assert third["scores"] is None


def test_parquet_and_saved_data_sets_are_read(tmp_path):
    import datasets

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert values(read_source(str(tmp_path / "rows.parquet"))) == rows
    assert values(read_source(str(tmp_path / "one"))) == rows
    two = read_source(str(tmp_path / "two"))
    assert [row["split"] for row in values(two)] == ["train", "train", "test"]
    assert places(two)[-1] == "two[test]:1"


def test_a_folder_as_the_hub_has_it_is_read_with_its_splits(tmp_path):
    import datasets

    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a card")
    for split, texts in (("train_prefs", ["a", "b", "c"]), ("test_prefs", ["d"]), ("train_sft", ["e"])):
        shards = [texts[:2], texts[2:]] if len(texts) > 2 else [texts]
        for number, part in enumerate(shards):
            name = f"{split}-{number:05}-of-{len(shards):05}.parquet"
            datasets.Dataset.from_list([{"text": text} for text in part]).to_parquet(tmp_path / "data" / name)
    source = read_source(str(tmp_path))
    assert [(row["split"], row["text"]) for row in values(source)] == [
        *[("test_prefs", "d"), ("train_prefs", "a"), ("train_prefs", "b"), ("train_prefs", "c"), ("train_sft", "e")],
    ]
    assert places(source)[3] == "train_prefs-00001-of-00002.parquet:1"
    assert values(read_source(str(tmp_path), split="train_sft")) == [{"text": "e", "split": "train_sft"}]
    with pytest.raises(DataError, match="no split 'prefs'; expected one of test_prefs, train_prefs, train_sft, or all"):
        read_source(str(tmp_path), split="prefs")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train.jsonl", "test.jsonl"), {"train", "test"}),
        (("train_prefs.jsonl", "test_prefs.jsonl.gz"), {"train_prefs", "test_prefs"}),
        (("hh_train_1.jsonl", "hh_train_2.jsonl", "hh_eval.jsonl"), {"train", "test"}),
        (("train/0000.jsonl", "train/0001.jsonl", "dev/0000.jsonl"), {"train", "validation"}),
        (("valid.json", "training.csv"), {"train", "validation"}),
        (("train-00.jsonl", "train-01.jsonl"), {None}),  # one split is none
        (("part1.jsonl", "part2.jsonl"), {None}),
        (("math-00000-of-00001.jsonl", "code-00000-of-00001.jsonl"), {"math", "code"}),
    ],
)
def test_the_names_of_files_name_their_splits(tmp_path, names, splits):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text\na\n" if name.endswith("csv") else '{"text": "a"}\n')
    rows = values(read_source(str(tmp_path)))
    assert len(rows) == len(names)
    assert {row.get("split") for row in rows} == splits


def test_a_folder_with_files_of_no_split_beside_others_is_refused(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"files of the splits test, train, and prompts\.jsonl"):
        read_source(str(tmp_path))


def test_what_is_no_source_is_said(tmp_path, monkeypatch, jsonl):
    jsonl({"text": "a"}, name="pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownReference, match=r"pears\.jsonl: no such file.*did you mean 'pairs\.jsonl'"):
        read_source("pears.jsonl")
    with pytest.raises(UnknownReference, match="no such world"):
        read_source("world:nowhere")
    with pytest.raises(UnknownReference, match="not a hub id"):
        read_source("two words")
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_source("rows.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a complete directory saved by `datasets`"):
        read_source("empty")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(DataError, match="unknown kind of file"):
        read_source("rows.txt")


def test_a_hub_that_cannot_be_reached_is_said_in_one_fault(monkeypatch):
    import datasets

    def unreachable(name, config):
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="org/name: no such local file, and it cannot be loaded from the hub"):
        read_source("org/name")


def collect(home, version: int, text: str, digest: str | None = None) -> None:
    folder = home / "data" / "pairs" / f"v{version}"
    folder.mkdir(parents=True)
    content = (json.dumps({"text": text}) + "\n").encode()
    (folder / "records.jsonl").write_bytes(content)
    files = {"records.jsonl": {"size": len(content), "sha256": digest or sha256(content).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps({"tokenizer_digest": "t0", "files": files}))


def test_collected_data_are_found_by_name_and_version(tmp_path, monkeypatch):
    for version in (2, 9, 10):
        collect(tmp_path, version, f"text {version}")
    latest = read_source("collected:pairs", home=tmp_path)
    assert (latest.name, latest.tokenizer_digest) == ("collected:pairs@v10", "t0")
    assert latest.rows == [("collected:pairs@v10:1", {"text": "text 10"})]
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    assert values(read_source("collected:pairs@v2")) == [{"text": "text 2"}]
    with pytest.raises(UnknownReference, match="there are v2, v9, v10"):
        read_source("collected:pairs@v3")
    with pytest.raises(UnknownReference, match="did you mean 'pairs'"):
        read_source("collected:pears")


def test_collected_data_that_changed_are_refused(tmp_path):
    collect(tmp_path, 1, "text", digest="0" * 64)
    with pytest.raises(DamagedFile, match=r"records\.jsonl: found sha256 .* expected 0000"):
        read_source("collected:pairs", home=tmp_path)
    (tmp_path / "data" / "pairs" / "v1" / "manifest.json").unlink()
    with pytest.raises(DamagedFile, match="missing"):
        read_source("collected:pairs", home=tmp_path)


GOOD = {"prompt": "café", "chosen": "a", "rejected": "b"}
LINE = json.dumps(GOOD, ensure_ascii=False).encode()
TABLE = "prompt,chosen,rejected\r\ncafé,a,b\r\n".encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b"\xef\xbb\xbf" + LINE + b"\n"),
        ("rows.jsonl", LINE + b"\r\n\r\n"),
        ("rows.jsonl", LINE),
        ("rows.json", b"\xef\xbb\xbf[\r\n" + LINE + b"\r\n]\r\n"),
        ("rows.csv", b"\xef\xbb\xbf" + TABLE),
        ("rows.csv", TABLE.replace(b"\r\n", b"\n")),
        ("rows.csv", TABLE.removesuffix(b"\r\n")),
        ("rows.csv", TABLE.replace(b"\r\n", b"\r")),
        ("rows.jsonl.gz", LINE),
        ("rows.jsonl", gzip.compress(LINE, mtime=0)),
        ("rows.csv.gz", gzip.compress(TABLE[:20], mtime=0) + gzip.compress(TABLE[20:], mtime=0)),
    ],
)
def test_marks_line_ends_and_archives_are_no_faults(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    source = read_source(str(tmp_path / name))
    assert values(source) == [GOOD] and source.faults == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_lines_of_10_mb_are_read(tmp_path, name):
    from rlhf_pipeline.data.check import describe
    from rlhf_pipeline.data.load import read_records

    prompt = 'one, "two" three four five six seven ' * 270_000
    rows = [{"chosen": prompt + "three", "rejected": prompt + "four"}] * 2
    path = tmp_path / name
    if name == "rows.csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["chosen", "rejected"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "\n".join(map(json.dumps, rows)) if name == "rows.jsonl" else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
    found = describe(read_records(str(path), skip_bad_rows=True))
    assert (found["usable"], found["lengths"]["prompt"]["max"]) == (2, len(prompt) - 1)
    assert found["duplicate_rows"] == 1


def test_an_escaped_nul_is_a_character_like_others(jsonl):
    assert values(read_source(jsonl('{"text": "a\\u0000b"}'))) == [{"text": "a\0b"}]


def test_a_key_given_twice_is_named_wherever_it_is(tmp_path, jsonl):
    inside = '{"messages": [{"role": "user", "content": "a", "role": "user"}]}'
    source = read_source(jsonl('{"text": "a"}', '{"text": "a", "text": "a"}', inside))
    found = [(item.fault.where.rpartition(":")[2], item.reason, item.fault.found) for item in source.faults]
    assert found == [
        ("2", "duplicate_key", "duplicate_key: 'text' is given twice"),
        ("3", "duplicate_key", "duplicate_key: 'role' is given twice"),
    ]
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"},\n{"text": "b", "text": "c"},\n{"x": NaN},\n{"text": "d"}]')
    source = read_source(str(path))
    assert values(source) == [{"text": "a"}, {"text": "d"}]
    assert [(item.fault.where.rpartition(":")[2], item.reason) for item in source.faults] == [
        ("2", "duplicate_key"),
        ("3", "bad_json"),
    ]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000 + ".jsonl", "/" + "y/" * 5000])
def test_a_name_that_no_file_can_have_is_no_source(name):
    with pytest.raises(UnknownReference, match=r"not a path|no such file"):
        read_source(name)


def test_rows_of_an_array_on_one_line_have_places_of_their_own(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": "b"}, 3,\n{"text": "c"}]')
    source = read_source(str(tmp_path / "rows.json"))
    assert places(source) == ["rows.json:1", "rows.json:1 (row 2)", "rows.json:2"]
    assert source.faults[0].fault.where.endswith("rows.json:1 (row 3)")


def test_the_end_of_a_message_of_json_is_not_doubled(jsonl, tmp_path):
    found = read_source(jsonl('{"prompt": "the plot', '{"prompt": "a"}'))
    assert "Unterminated string starting at column 12" in str(found.faults[0].fault)
    with pytest.raises(DataError, match="Unterminated string starting; expected"):
        (tmp_path / "rows.json").write_text('[{"prompt": "the plot')
        read_source(str(tmp_path / "rows.json"))


def test_faults_stand_in_the_order_of_their_lines():
    places = ["a:201", "a:11", "b[x]:3", "a:51 (row 12)", "a:51 (row 2)", "b[y]:1", "b[x]:2", "a"]
    ordered = [item.fault.where for item in by_line([row_fault(place, "null", "") for place in places])]
    assert ordered == ["a", "a:11", "a:51 (row 2)", "a:51 (row 12)", "a:201", "b[x]:2", "b[x]:3", "b[y]:1"]
