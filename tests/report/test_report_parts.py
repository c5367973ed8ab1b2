"""The parts of a report: numbers as text, colours that can be read, forms that are drawn."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from pathlib import Path

import pytest

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.report import page as pages
from rlhf_pipeline.report.drawing import draw, place_labels
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.markup import Markup, estimate, h, join
from rlhf_pipeline.report.points import Points, cells
from rlhf_pipeline.report.results import Results
from rlhf_pipeline.report.sections.overoptimisation import fitted
from rlhf_pipeline.report.sides import GaoFit
from rlhf_pipeline.report.style import DARK, LIGHT, looks
from rlhf_pipeline.report.text import (
    clean,
    duration,
    interval_text,
    memory,
    number,
    percent,
    plain,
    probability,
    scaled,
    short,
    tick,
    words,
)
from rlhf_pipeline.report.view import View, setting_text
from tests.report.report_fixture import plain as plain_results


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain", "plain"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("\x00\x1b[1m", "␀␛[1m"),
        ("\x7f\x9b\ud800\uffff", "\ufffd" * 4),
        ("a\u202eb\u2067c", "a⟨U+202E⟩b⟨U+2067⟩c"),
        ("שלום 日本 😀", "שלום 日本 😀"),
        (None, "None"),
    ],
)
def test_text_that_a_page_can_hold(given: object, shown: str) -> None:
    assert clean(given) == shown


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (number(1.2345), "1.23"),
        (number(-0.5), "−0.50"),
        (number(-0.001), "0.00"),
        (number(1234.5, 1), "1,234.5"),
        (number(123456.7), "123,457"),
        (number(float("nan")), "–"),
        (number(None), "–"),
        (plain(0.1), "0.1"),
        (plain(1e-5), "1e-05"),
        (plain(-2.0), "−2"),
        (plain(True), "True"),
        (plain("cosine\x00"), "cosine␀"),
        (percent(0.7071), "70.7 %"),
        (percent(None), "–"),
        (probability(None), "–"),
        (scaled(None), "–"),
        (duration(None), "–"),
        (probability(0.0004), "< 0.001"),
        (probability(0.0314), "0.031"),
        (scaled(12.4e12, "FLOP"), "12.4 TFLOP"),
        (scaled(999.0), "999"),
        (scaled(1500), "1.50 k"),
        (scaled(0), "0"),
        (tick(0.0), "0"),
        (tick(1.2e12), "1.2 T"),
        (tick(250.0), "250"),
        (duration(3.14), "3.1 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(200), "3 min 20 s"),
        (duration(4320), "1 h 12 min"),
        (memory(512 * 2**20), "512 MiB"),
        (memory(3 * 2**29), "1.50 GiB"),
        (short("a  b\nc", 9), "a b c"),
        (short("abcdef", 4), "abc…"),
        (words(["a", "b", "c"]), "a, b and c"),
        (setting_text({"beta": 0.1, "lr": 1e-4}), "β 0.1, lr 0.0001"),
    ],
)
def test_numbers_as_text(made: str, shown: str) -> None:
    assert made == shown


def test_only_markup_is_markup() -> None:
    assert h("p", "a<b & 'c'", Markup("<br/>"), None, title='"x"') == (
        '<p title="&quot;x&quot;">a&lt;b &amp; &#x27;c&#x27;<br/></p>'
    )
    assert join(["<", h("wbr")], ">") == "&lt;&gt;<wbr/>"


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_everything_written_can_be_read(colours: dict[str, str]) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    written = [name for name in colours if name not in ("page", "panel", "line", "grid")]
    assert len(written) == 12
    for name in written:
        for ground in ("page", "panel"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def test_an_arm_looks_the_same_everywhere() -> None:
    many = looks(["other", "dpo", "ppo", "best-of-n"])
    assert many["ppo"] == looks(["ppo"])["ppo"] and many["dpo"] == looks(["dpo", "x"])["dpo"]
    assert len({look.hue for look in many.values()}) == len({look.marker for look in many.values()}) == 4
    found = looks(["ppo@v1", "ppo@v2", "long"], {"ppo@v1": "ppo", "ppo@v2": "ppo", "long": "dpo"})
    assert found["ppo@v1"] == many["ppo"] and found["long"] == many["dpo"]
    assert len({look.hue for look in found.values()}) == 3
    assert len({look.hue for look in looks([str(i) for i in range(8)]).values()}) >= 5
    crowd = looks([str(i) for i in range(30)])
    assert len({(look.hue, look.marker) for look in crowd.values()}) == 30  # no two arms of a large family look alike


def test_an_interval_as_text_as_markup_and_in_a_csv() -> None:
    known = Interval(mean=1.0, low=-0.5, high=2.0, n=8, clusters=2, method="t")
    assert interval_text(known) == "1.00 [−0.50, 2.00]" and cells(known) == (1.0, -0.5, 2.0)
    assert estimate(known, 1) == '<b>1.0</b> <span class="ci">[−0.5, 2.0]</span>'
    for changes in ({"low": None}, {"high": None}, {"low": float("-inf")}, {"low": None, "high": float("inf")}):
        unknown = Interval.model_validate(known.model_dump() | changes)
        assert interval_text(unknown) == "1.00" and cells(unknown) == (1.0, None, None)
        assert estimate(unknown) == "<b>1.00</b>"
    assert estimate(None) == '<span class="none">–</span>' and cells(None) == (None, None, None)


def test_the_form_of_over_optimisation() -> None:
    fit = GaoFit(form="rl", alpha=2.0, beta=0.5, peak=None, least=1.0, largest=math.e, points=4, residual=0.0)
    drawn = fitted(fit)
    assert drawn[0] == (1.0, pytest.approx(2.0))
    assert drawn[-1] == (pytest.approx(math.e), pytest.approx(math.e * 1.5))
    from_zero = fitted(fit.model_copy(update={"least": 0.0}))
    assert min(d for d, _ in from_zero) > 0 and len(from_zero) == len(drawn) - 1  # ln 0 is left out
    assert fitted(None) == []


def test_numbers_survive_a_csv() -> None:
    points = Points()
    values = [0.1 + 0.2, 1e-300, -1 / 3, 12345678901234567, None, 'a,"b"\nc']
    assert points.add("t", [str(i) for i in range(6)], [values]) == "points/t.csv"
    _, row = csv.reader(io.StringIO(points.files()["t.csv"], newline=""))
    assert [float(cell) for cell in row[:3]] == values[:3] and int(row[3]) == values[3]
    assert row[4:] == ["", 'a,"b"\nc']


def test_labels_hide_neither_points_nor_one_another() -> None:
    boxes: list = []

    def paint(axes):
        points = [(i / 10, i / 10) for i in range(11)]
        axes.plot(*zip(*points), ls="", marker="o")
        labels = [(x, y, f"label {i}", "ink") for i, (x, y) in enumerate(points)]

        place_labels(axes, labels, points)
        where = axes.transData.transform
        renderer = axes.figure.canvas.get_renderer()
        found = [text.get_window_extent(renderer) for text in axes.texts]
        boxes.append((found, [where(point) for point in points], axes.get_window_extent()))

    svg = draw("x", "title", "description", paint, size=(400, 300))
    (found, points, frame), *_ = boxes
    assert len(found) >= 9 and svg.count("label ") == len(found)
    for index, box in enumerate(found):
        assert not any(box.contains(*point) for point in points)
        assert not any(box.overlaps(other) for other in found[:index])
        assert frame.x0 - 5 <= box.x0 and box.x1 <= frame.x1 + 5


def test_rows_are_grouped_by_setting_and_named_by_it() -> None:
    results = plain_results()
    like = next(row for row in results["rows"] if row["stage"] == "ppo")
    baseline = [row for row in results["rows"] if row["model"] == results["baseline"] and row["stage"] == "sft"]
    settings = enumerate([(10.0, 0), (0.5, 1), (0.5, 0)])
    rows = [
        like | {"name": f"m{i}", "model": f"m{i}", "setting": {"beta": beta}, "seed": seed}
        for i, (beta, seed) in settings
    ]
    rows.append(like | {"name": "m1#5", "model": "m1#5", "setting": {"beta": 0.5}, "seed": 1, "step": 5})
    view = View(Results.model_validate(results | {"seeds": [0, 1], "rows": [*baseline, *rows]}))
    assert [[row.name for row in group] for group in view.settings("ppo")] == [["m1", "m2"], ["m0"]]
    assert view.title("m1") == "ppo β 0.5, seed 1" and view.title("m1#5") == "ppo β 0.5, seed 1 #5"
    assert view.title("unknown") == "unknown" and view.title(results["baseline"]) == results["baseline"]
    assert view.has_seeds()
    alone = View(Results.model_validate(results | {"rows": [*baseline, like]}))
    assert alone.title(like["name"]) == like["name"] and not alone.has_seeds()


def test_a_full_disk_leaves_whole_tables_and_what_the_page_refers_to(tmp_path, monkeypatch) -> None:
    def points(value: int, *names: str) -> Points:
        made = Points()
        for name in names:
            made.add(name, ["x"], [[value]])
        return made

    points(1, "a", "b", "old").write(tmp_path)
    real = os.fsync

    def full(handle: int) -> None:
        if "/.b.csv-" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="disk full"):
        points(2, "a", "b").write(tmp_path)
    folder = tmp_path / "points"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a.csv": "x\n2\n",
        "b.csv": "x\n1\n",
        "old.csv": "x\n1\n",
    }
    monkeypatch.undo()
    points(2, "a", "b").remove_stale(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "b.csv"]


def test_stale_tables_go_after_the_page(tmp_path, monkeypatch) -> None:
    (tmp_path / "points").mkdir()
    (tmp_path / "points/old.csv").write_text("x\n")

    results = Results.model_validate(plain_results())

    def full(path: Path, text: str) -> None:
        raise RunFailed("disk full")

    monkeypatch.setattr(pages, "page", lambda results, points: "page")
    monkeypatch.setattr(pages, "replace_text", full)
    with pytest.raises(RunFailed):
        pages.write_report(results, tmp_path)
    assert (tmp_path / "points/old.csv").exists()
    monkeypatch.undo()
    monkeypatch.setattr(pages, "page", lambda results, points: "page")
    pages.write_report(results, tmp_path)
    assert not (tmp_path / "points/old.csv").exists()


def test_an_arm_of_a_relative_of_ppo_says_so() -> None:
    written = plain_results()
    for row in written["rows"]:
        if row.get("arm") == "ppo":
            row["algorithm"] = "rloo"
    view = View(Results.model_validate(written))
    assert (view.called("ppo"), view.called("dpo")) == ("ppo (RLOO)", "dpo")
