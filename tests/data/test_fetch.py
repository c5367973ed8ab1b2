"""`rlhf data fetch`: the first rows of a data set of the hub, which is loaded as a stream."""

from __future__ import annotations

import datetime
import json

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data.fetch import fetch
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.errors import BadInput, DataError, UnknownReference


@pytest.fixture
def hub(monkeypatch):
    """Publish rows by split, as one hub that is loaded as a stream; returns the numbers of rows that were read."""
    import datasets

    def publish(**splits):
        read = dict.fromkeys(splits, 0)

        def rows(split):
            for row in splits[split]:
                if isinstance(row, Exception):
                    raise row
                read[split] += 1
                yield row

        def load(name, config, streaming):
            assert (name, config, streaming) == ("org/name", None, True)
            tables = {
                name: datasets.IterableDataset.from_generator(rows, gen_kwargs={"split": name}) for name in splits
            }
            return datasets.IterableDatasetDict(tables)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return read

    return publish


ROWS = [{"prompt": f"question {n}", "chosen": "é", "rejected": "no", "at": datetime.date(2026, 1, 1)} for n in range(9)]


@pytest.mark.check
def test_the_first_rows_of_each_split_are_a_source(hub, tmp_path, capsys):
    read = hub(train=ROWS, math=ROWS[7:])
    folder = tmp_path / "new" / "few"
    assert main(["data", "fetch", "org/name", str(folder), "--rows", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(folder), "rows": {"train": 4, "math": 2}}
    assert read["train"] <= 5 and not list(folder.parent.glob(".*"))
    found = read_records(str(folder)).records
    assert [(record.prompt, record.split) for record in found] == [
        *(("question 7", "math"), ("question 8", "math")),
        *((f"question {n}", "train") for n in range(4)),
    ]
    assert found[0].columns == {"at": "2026-01-01"} and found[0].completions == ("é", "no")
    with pytest.raises(BadInput, match="few: exists"):
        fetch("org/name", folder, 4)


def test_what_is_not_on_the_hub_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    for source, said in ((str(tmp_path / "rows.jsonl"), "on this machine"), ("collected:a", "on this machine")):
        with pytest.raises(UnknownReference, match=said):
            fetch(source, tmp_path / "new", 1)
    with pytest.raises(UnknownReference, match="not a hub id"):
        fetch("two words", tmp_path / "new", 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"score": float("nan")}, r"org/name\[train\]:3: Out of range float values"),
        (ConnectionError("gone"), r"org/name: the stream of split 'train' broke off after 2 rows \(gone\)"),
    ],
)
def test_a_stream_that_fails_leaves_nothing(hub, tmp_path, row, said):
    hub(train=[{"score": 1.0}, {"score": 2.0}, row])
    with pytest.raises(DataError, match=said):
        fetch("org/name", tmp_path / "few", 9)
    assert not list(tmp_path.iterdir())
