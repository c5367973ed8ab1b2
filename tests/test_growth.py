"""`make growth`: every point of every series is measured, and a table says what it is over the lowest. No time is
asserted."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def growth():
    """The script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        yield importlib.import_module("growth")


def test_a_table_by_hand(growth) -> None:
    # 1 s for 8 units: 125,000 µs each; 4.5 s (the median of three) for 24: 187,500 µs, 1.5 times as much.
    found = [(100, ([1.0], 3 * 2**20), 8), (2000, ([9.0, 4.5, 2.0], None), 24)]
    assert list(growth.table("batch", found)) == [
        "| pairs of a micro-batch | µs for a pair | over the lowest | peak memory, MiB |",
        "| ---: | ---: | ---: | ---: |",
        "| 100 | 125,000.0 | 1.00 | 3 |",
        "| 2,000 | 187,500.0 | 1.50 | - |",
    ]


def test_every_series_grows_and_its_steps_come_out_even(growth) -> None:
    for _, _, points, quick in growth.SERIES.values():
        assert list(points) == sorted(set(points)) and len(points) >= 3 and len(quick) == 2
    assert all(16 % value == 0 for value in growth.SERIES["completions"][2])  # completions of a step
    assert all(64 % value == 0 for value in growth.SERIES["batch"][2])  # pairs of a step
    assert max(growth.SERIES["length"][2]) == 2048 and max(growth.SERIES["vocabulary"][2]) == 131_072


def test_examples_have_the_lengths_asked_for(growth) -> None:
    examples = growth.draw(3, 6, (2, 4), 50)
    assert [(len(e.prompt_ids), [len(ids) for ids in e.completions]) for e in examples] == [(6, [2, 4])] * 3
    assert all(0 < token < 50 for e in examples for ids in (e.prompt_ids, *e.completions) for token in ids)


@pytest.mark.slow
@pytest.mark.check
def test_every_series_is_measured(growth, capsys) -> None:
    assert growth.main(["--quick"]) == 0
    text = capsys.readouterr().out
    for series, (grows, _, _, quick) in growth.SERIES.items():
        part = text.partition(f"## {series}\n")[2].partition("##")[0]
        assert f"| {grows} |" in part
        rows = re.findall(r"^\| ([\d,]+) \| [\d,.]+ \| ([\d.]+) \| [\d,-]+ \|$", part, re.MULTILINE)
        assert [value.replace(",", "") for value, _ in rows] == [str(value) for value in quick]
        assert min(float(over) for _, over in rows) == 1.0


def test_an_unknown_series_exits_with_2(growth, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        growth.main(["length", "depth"])
    assert (
        stopped.value.code == 2 and "no such series: depth; expected some of length, data," in capsys.readouterr().err
    )
