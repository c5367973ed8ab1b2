"""results.json as types: the schema file, what is refused, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.evaluation.statistics import Estimate
from rlhf_pipeline.report import load
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.results import SCHEMA, Results, schema
from tests.report.report_fixture import full, plain


def test_the_schema_file_is_that_of_the_classes() -> None:
    # To make it again: SCHEMA.write_text(schema())
    assert SCHEMA.read_text(encoding="utf-8") == schema()


@pytest.mark.parametrize("results", [full, plain])
def test_what_a_comparison_wrote_is_read_and_written_again_without_a_change(results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results()), encoding="utf-8")
    read = load(path)
    assert read.version == 1 and Results.model_validate_json(read.model_dump_json()) == read
    kept = json.loads(read.model_dump_json(exclude_unset=True))
    assert kept == results()


def test_an_infinite_end_is_null() -> None:
    found = Interval.of(Estimate(0.5, float("-inf"), float("inf"), 4, 1, "t"))
    assert found.ends is None and not found.excludes()
    assert json.loads(found.model_dump_json()) == {
        "mean": 0.5, "low": None, "high": None, "n": 4, "clusters": 1, "method": "t",
    }  # fmt: skip


def test_an_interval_excludes_what_lies_outside() -> None:
    found = Interval(mean=1.0, low=0.25, high=1.75, n=4, clusters=4, method="t")
    assert found.excludes() and found.excludes(2.0) and not found.excludes(1.5) and not found.excludes(0.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "found invalid JSON"),
        ("[]", "found no version, expected version 1"),
        ('{"version": 99}', "found version 99, expected version 1"),
        ('{"version": 1}', "faults, the first at name: Field required"),
        (json.dumps({**plain(), "surprise": 1}), "1 faults, the first at surprise: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_results_is_refused_with_the_place(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DamagedFile, match=message) as refused:
        load(path)
    assert str(path) in str(refused.value) and "compare again" in str(refused.value)


def test_the_report_needs_no_torch() -> None:
    heavy = "('torch', 'transformers', 'datasets')"
    code = f"import sys, rlhf_pipeline.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
