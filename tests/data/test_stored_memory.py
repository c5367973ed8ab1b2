"""What of a store is resident memory: pages of its mapped files that were read are let go."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_pipeline.data import choices, parsed, rows
from rlhf_pipeline.data.load import examples_of, read_records, records_digest
from rlhf_pipeline.data.splits import in_split
from rlhf_pipeline.disk.arrays import Table, Writer, entries, release, stored

LENGTHS = SimpleNamespace(prompt=99, response=99, total=198)
ROWS = 3000


def resident() -> dict[str, int]:
    """Bytes of each mapped array of a store that are resident memory of this process."""
    found: dict[str, int] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = line.split(maxsplit=5)[5:]
            name = Path(path[0]).stem if path and path[0].endswith(".bin") else ""
        elif name and line.startswith("Rss:"):
            found[name] = found.get(name, 0) + int(line.split()[1]) * 1024
    return found


@pytest.fixture
def both(jsonl, tmp_path, monkeypatch):
    """Records of one source in memory and in a store."""
    texts = [("ab" * (n % 40 + 1), "abcd"[n % 4] * (n % 7 + 1)) for n in range(ROWS)]
    source = jsonl(*({"prompt": a + b, "chosen": b, "rejected": b + "a"} for a, b in texts))
    plain = read_records(source, home=tmp_path)
    monkeypatch.setattr(parsed, "STORED_BYTES", 0)
    return plain, read_records(source, home=tmp_path)


def test_pages_of_a_mapped_array_are_let_go(tmp_path):
    def fill(writer: Writer) -> dict[str, int]:
        writer.add("numbers", np.arange(1 << 18))
        return {}

    table = stored(tmp_path / "one", fill, pytest.fail)
    numbers = table["numbers"]
    assert numbers.sum() == (1 << 18) * ((1 << 18) - 1) // 2 and resident()["numbers"] == 8 << 18
    release(numbers[5:7])
    assert resident()["numbers"] == 0 and numbers[77] == 77
    places = np.arange(0, 1 << 18, 3)
    assert np.array_equal(entries(numbers, places), places) and resident()["numbers"] == 0
    kept = np.arange(9)
    Table({"kept": kept}, {}).release()
    assert np.array_equal(entries(kept, np.array([8, 0, 8])), [8, 0, 8])


@pytest.mark.check
def test_a_stage_keeps_no_pages_of_lines_texts_and_ids(both, letters):
    _, found = both
    examples, _ = examples_of(found, kind="preference", split="train", tokenizer=letters, lengths=LENGTHS)
    assert len(examples) > ROWS // 2
    assert {resident()[name] for name in ("lines", "beside", "texts", "ids")} == {0}
    assert sum(1 for _ in found.records) == ROWS
    assert {resident()[name] for name in ("lines", "beside")} == {0}


@pytest.mark.check
def test_a_digest_reads_the_lines_piece_by_piece(both, monkeypatch):
    plain, found = both
    lines, piece = len(found.records.table["lines"]), 1 << 14
    read = [0]  # bytes between two releases

    class Noted:
        def __init__(self):
            self.digest = sha256()

        def update(self, content):
            read[-1] += len(content)
            self.digest.update(content)

        def hexdigest(self):
            return self.digest.hexdigest()

    monkeypatch.setattr(rows, "_PIECE", piece)
    monkeypatch.setattr(rows, "sha256", Noted)
    monkeypatch.setattr(rows, "release", lambda _: read.append(0))
    for split in ("all", "train", "test"):
        assert records_digest(in_split(found.records, split)) == records_digest(in_split(plain.records, split))
    assert lines > 8 * piece and max(read) <= 2 * piece and read[-1] == 0
    assert records_digest(found.records.select(np.zeros(0, np.int64))) == records_digest([])


@pytest.mark.check
def test_a_stage_without_a_limit_makes_no_text_of_the_key_of_each_row(both, letters, monkeypatch):
    _, found = both
    monkeypatch.setattr(choices, "hex_rows", pytest.fail)
    examples, _ = examples_of(found, kind="preference", split="all", tokenizer=letters, lengths=LENGTHS)
    assert len(examples) == ROWS
