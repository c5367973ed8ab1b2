"""Tables in terminals of any width: no name and no figure is cut."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from rlhf_pipeline.cli import output
from rlhf_pipeline.cli.compare import print_comparison
from rlhf_pipeline.cli.output import emit_table, interval
from rlhf_pipeline.report.figures import Cost, Interval, Row
from rlhf_pipeline.report.results import Results, Verdict
from tests.compare.test_verdict import NOTHING

NAMES = ("sft@v1", "my-ppo-of-a-long-name@v1", "my-dpo@v1", "best of 16 of sft@v1")
FIGURES = ("true_reward", "judge", "score", "kl", "well_formed", "ended", "length")


def mean(value: float) -> Interval:
    return Interval(mean=value, low=value - 0.25, high=value + 0.25, n=4, clusters=2, method="t")


def comparison() -> Results:
    """A comparison in which every figure is another number."""
    rows = [
        Row(
            name=name,
            model=name,
            stage="dpo",
            arm=name,
            beta=0.5,
            scored_by="reward@v1",
            metrics={figure: mean(10 * number + place) for place, figure in enumerate(FIGURES)},
            win_rate=mean(10 * number + 8),
            gain_in_sd=10.0 * number + 9,
            cost=Cost(**dict.fromkeys(Cost.model_fields, 1e9 * number)),
        )
        for number, name in enumerate(NAMES, start=1)
    ]
    shared = {"prompts": 23, "samples": 4, "primary": "true_reward", "baseline": NAMES[0], "reference": NAMES[0]}
    verdict = Verdict(headline="cannot tell", certain=False, lines=[])
    rest = {"samples_shown": [], "curves": {}, "lineage": [], "configs": {}, "path": "results.json", "report": "page"}
    return Results(**{**NOTHING, **shared, **rest, "seeds": [0], "rows": rows, "verdict": verdict})


@pytest.fixture
def terminal(monkeypatch, capsys):
    """A terminal of a width: what it shows of a call."""

    def shown(width: int, function, *arguments, **options) -> str:
        monkeypatch.setattr(output, "printer", lambda: Console(width=width, highlight=False))
        function(*arguments, **options)
        return capsys.readouterr().out

    return shown


@pytest.mark.parametrize("width", [80, 40])
def test_a_comparison_is_whole_in_a_narrow_terminal(terminal, width):
    text = terminal(width, print_comparison, comparison())
    tables = text.split("figures: mean")[0]
    assert "…" not in tables and max(map(len, tables.splitlines())) <= width
    for number, name in enumerate(NAMES, start=1):
        assert name in tables
        for place in range(len(FIGURES)):
            assert f"{10 * number + place}.00 ± 0.25" in tables
        assert f"{10 * number + 8}.00 ± 0.25" in tables and f"{10 * number + 9}.00" in tables
        assert f"{number},000,000,000" in tables


@pytest.mark.parametrize(("width", "groups"), [(51, None), (50, (3,)), (30, (3,)), (29, (2, 1)), (22, (1, 1, 1))])
def test_a_table_that_does_not_fit_is_turned_by_as_many_models_as_fit(terminal, width, groups):
    # A column has a space on both sides and a border, a table one border more. As it stands: 5 + 6 x 4 + 3 x 7 + 1 =
    # 51 columns; turned with k models: 5 + 4 k + 3 (k + 1) + 1 = 9 + 7 k.
    figures = [f"{n}.{n}{n}" for n in range(6)]
    columns = ("model", *(f"f{n}" for n in range(6)))
    rows = [(f"m{n}", *figures) for n in range(3)]
    lines = [line.split() for line in terminal(width, emit_table, "few", columns, rows).splitlines()]
    if groups is None:
        assert list(columns) in lines and all(list(row) in lines for row in rows)
        return
    names = iter(row[0] for row in rows)
    heads = [["model", *(next(names) for _ in range(k))] for k in groups]
    assert [line for line in lines if line[:1] == ["model"]] == heads
    for number, figure in enumerate(figures):
        assert [line for line in lines if line[:1] == [f"f{number}"]] == [[f"f{number}", *[figure] * k] for k in groups]


REASON = "held-out accuracy 0.62 [0.50, 0.70]; does not beat longer wins, difference 0.02 [-0.10, 0.10] (not certain)"
KEYS = ("baselines longer wins accuracy", "baselines longer wins accuracy low", "gate reason")


@pytest.mark.parametrize("width", [80, 60, 40])
def test_keys_stay_whole_and_long_values_fold(terminal, width):
    rows = list(zip(KEYS, ("0.61", "0.52", REASON), strict=True))
    text = terminal(width, emit_table, "reward", ("metric", "value"), rows)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert all(key in text for key in KEYS)
    words = text.split()
    assert "0.61" in words and "0.52" in words
    assert [word for word in words if word in REASON.split()][-len(REASON.split()) :] == REASON.split()


def test_a_table_without_rows_has_its_title_and_heads(terminal):
    text = terminal(20, output.emit_table, "a home", ("model", "stage", "parents"), [])
    assert "a home" in text and all(name in text for name in ("model", "stage", "parents"))


def test_a_table_that_fits_is_as_it_was(terminal):
    text = terminal(200, emit_table, "reward", ("metric", "value"), [("gate reason", "x" * 100), ("seconds", "3.2")])
    assert f"  gate reason   {'x' * 100}" in text and f"  seconds       {'3.2':>100}" in text


def test_a_list_folds_before_it_is_turned(terminal):
    columns, rows = ("model", "from", "digest"), [("ppo@v1", "reward@v1, sft@v1, other@v2", "0123456789ab")]
    lines = terminal(40, emit_table, "home", columns, rows, folds=("from",)).splitlines()
    assert any(line.split() == ["model", "from", "digest"] for line in lines)
    assert "0123456789ab" in "\n".join(lines) and any(line.strip().endswith("other@v2") for line in lines)


def test_a_real_terminal_of_80_columns(tiny):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "rlhf_pipeline.cli.main", "--home", str(tiny.home), "models", "show", "reward"]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(command, stdout=theirs, env=environment | {"TERM": "xterm"})
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    assert child.wait() == 0
    shown = text.decode()
    assert "…" not in shown and "gate reason" in shown and "held-out accuracy" in shown


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (3.186, 2.606, 3.766, "3.19 ± 0.58"),
        (1.0, 0.558, 1.0, "1.00 [0.56, 1.00]"),  # 8 prompts that all agree are not 1.00 ± 0.00
        (0.954, 0.9285, 0.9755, "0.95 ± 0.02"),  # lopsided by less than the digits show
        (0.95, 0.88, 0.98, "0.95 [0.88, 0.98]"),
        (1.5, None, None, "1.50"),
    ],
)
def test_plus_and_minus_stand_for_symmetric_intervals_alone(mean, low, high, text):
    assert interval(Interval(mean=mean, low=low, high=high, n=8, clusters=8, method="t")) == text


def test_no_figure_is_a_dash():
    assert interval(None) == "-"
