"""metrics.jsonl: which updates are written, and what a resumed run takes back."""

from __future__ import annotations

import json
import math
import sys

from rlhf_pipeline.training import tracking
from rlhf_pipeline.training.tracking import RunLog, jsonable


def open_log(directory, logging_steps=1, total=10):
    return RunLog(directory, title="t", total=total, shown=("a",), logging_steps=logging_steps, quiet=True)


def steps(directory):
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_first_the_last_and_every_nth_update_are_written(tmp_path):
    log = open_log(tmp_path, logging_steps=4, total=10)
    for step in range(1, 11):
        log.update(step, {"a": 1.0})
    log.close()
    assert steps(tmp_path) == [1, 4, 8, 10]


def test_rewind_drops_what_comes_after_the_checkpoint_and_a_cut_last_line(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.update(step, {"a": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a"')
    log = open_log(tmp_path)
    log.rewind(3)
    log.update(4, {"a": 2.0})
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_numbers_that_json_does_not_have_become_null():
    assert jsonable({"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}}) == {
        "a": None,
        "b": [None, 1.0],
        "c": {"d": None},
    }


def test_what_a_terminal_would_obey_is_shown_on_it_and_in_the_file(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path, title="x", total=1, shown=(), logging_steps=1)
    monkeypatch.setattr(tracking.console, "_file", sys.stderr)  # `file` would be set to this test's stderr for good
    log.say("failed its gate: \x1b[2J\u202e\ud800")
    tracking.console.print("x\x9b31m", markup=False)
    log.close()
    said = "failed its gate: \\x1b[2J\\u202e\\ud800\n"
    assert (tmp_path / "log.txt").read_text() == said
    assert capsys.readouterr().err == said + "x\\x9b31m\n"


def test_slow_updates_are_shown_between_two_lines_of_the_log(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(tracking.console, "_file", sys.stderr)
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: clock[0])
    log = RunLog(tmp_path, title="x", total=30, shown=("a",), logging_steps=10)
    for step in range(1, 10):
        clock[0] += 20.0  # so that every second update comes more than 30 s after the last line
        log.update(step, {"a": 0.5})
    log.close()
    lines = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["x 1/30", "x 3/30", "x 5/30", "x 7/30", "x 9/30"]
    assert [json.loads(row)["step"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]
