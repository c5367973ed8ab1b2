"""What the report shows: a section for everything there are data for, figures as given, every point in a CSV."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.readings import CURVES
from rlhf_pipeline.experiment import report
from rlhf_pipeline.report import write_report
from rlhf_pipeline.report.page import page
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.sections.curves import PANELS
from rlhf_pipeline.report.sections.verdict import TOPICS
from tests.report.report_fixture import emptied, full, not_comparable, plain, without_judge
from tests.report.report_fixture_page import SECTIONS, SVG, parsed, rows_of, sections


@pytest.fixture(scope="module")
def text(full_report: Path) -> str:
    return (full_report / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("ident", SECTIONS)
def test_a_section_is_there_when_its_data_are(ident: str) -> None:
    results = {key: value for key, value in full().items() if key in (*SECTIONS[ident], "name", "baseline")}
    made = sections(page(results, Points()))
    assert ident in made
    for key in SECTIONS[ident]:
        del results[key]
    assert ident not in sections(page(results, Points()))


def test_everything_is_there(text: str) -> None:
    assert sections(text) == set(SECTIONS)
    order = [item.attrib["id"] for item in parsed(text).iter("section")]
    assert order == list(SECTIONS)
    links = [item.attrib["href"] for item in parsed(text).find(".//nav").iter("a")]
    assert links == [f"#{ident}" for ident in order[1:]]


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, [None], {"x": None}, float("nan"), [[1]], {"x": {"y": [3]}}])
def test_absent_and_strange_parts_are_lived_with(value: Any) -> None:
    results = dict.fromkeys(full(), value)
    parsed(page(results, Points()))


def test_any_estimate_may_be_missing() -> None:
    results = emptied({key: full()[key] for key in full() if key != "curves"})
    made = sections(page(results, Points()))
    assert "frontier" not in made and "ranking" not in made
    assert {"verdict", "results", "cost", "exact", "samples"} <= made


def said_by(results: dict[str, Any]) -> str:
    return " ".join("".join(parsed(page(results, Points())).itertext()).split())


def test_the_plain_comparison_of_two_models() -> None:
    made = page(plain(), Points())
    assert sections(made) == set(SECTIONS) - {"overoptimisation"}  # one point is no curve
    said = said_by(plain())
    assert "seed" not in said.partition("Results")[2].partition("Cost")[0] and "snapshot" not in said
    assert "Every model on its own" not in said and "Every model on its own (8)" in said_by(full())


def test_without_a_judge_no_judge_is_spoken_of() -> None:
    results = without_judge(plain()) | {"verdict": None, "configs": {}, "lineage": [], "command": None}
    results["curves"] = {}
    for shown in results["samples_shown"]:
        for response in (entry for found in shown["responses"].values() for entry in found):
            del response["judge"]
    assert "judge" in said_by(plain()) and "judge" not in said_by(results)


def test_arms_that_differ_in_more_are_named_with_what_differs() -> None:
    said = said_by(not_comparable(plain()))
    assert "No. The arms differ in more than the algorithm. It was asked for with --allow-mismatch." in said
    assert "training prompts 3,840 prompts 3,712 prompts" in said.replace("prompts3", "prompts 3")
    assert "Yes. The arms share" in said_by(plain())


def test_every_panel_of_training_is_one_that_a_comparison_writes() -> None:
    written = {name for results in (full(), plain()) for curves in results["curves"].values() for name in curves}
    assert set(PANELS) == set(CURVES) == written


def test_the_page_reads_no_key_that_a_comparison_does_not_write() -> None:
    def keys(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from keys(entry)

    read = set()
    for path in set(Path(report.__file__).parent.rglob("*.py")) - {Path(report.__file__).with_name("svg.py")}:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func).rpartition(".")[2] in ("get", "part"):
                found = [word.value for word in call.args if isinstance(word, ast.Constant)]
                read |= {word for word in found if isinstance(word, str) and word}
    assert {"rows", "peak", "why_not", "length_controlled", "kl_bound"} <= read
    assert read <= {*keys(full()), *keys(not_comparable(plain()))}


def test_every_topic_of_the_verdicts_has_its_words() -> None:
    written = {line["topic"] for results in (full(), plain()) for line in results["verdict"]["lines"]}
    assert {"judge", "cost", "selected", "exact", "limits", "next"} <= written <= set(TOPICS)


def test_figures_as_they_are_printed() -> None:
    def figure(mean: float, low: float, high: float) -> dict[str, Any]:
        return {"mean": mean, "low": low, "high": high, "n": 32, "clusters": 8, "method": "t"}

    results = {
        "baseline": "sft@v1",
        "prompts": 8,
        "samples": 4,
        "split": "test",
        "rows": [
            {"name": "sft@v1", "arm": "sft@v1", "stage": "sft", "metrics": {"true_reward": figure(-0.004, -1.5, 1.5)}},
            {
                "name": "dpo@v1",
                "arm": "dpo",
                "stage": "dpo",
                "beta": 0.1,
                "metrics": {"true_reward": figure(1.234, 1.1, 1.356), "kl": figure(2.0, 1.0, 3.0)},
                "win_rate": figure(0.75, 0.5, 1.0),
                "ties": 0.153,
                "cost": {"flops": 1.5e12, "wall_seconds": 200.0},
            },
            {"name": "b", "stage": "best-of-n", "n": 2, "kl_bound": 0.193, "metrics": {"true_reward": figure(1, 0, 2)}},
        ],
    }
    table = next(parsed(page(results, Points())).iter("table"))
    lines = [["".join(cell.itertext()).strip() for cell in line] for line in table.iter("tr")]
    cost = ["1.50 TFLOP", "3 min 20 s"]
    assert lines == [
        ["arm and setting", "true reward ★", "KL", "win rate", "ties", "training", "wall time"],
        ["sft@v1", "0.00 [−1.50, 1.50]", "–", "–", "–", "–", "–"],
        ["dpo@v1, β 0.1", "1.23 [1.10, 1.36]", "2.00 [1.00, 3.00]", "0.75 [0.50, 1.00]", "15 %", *cost],
        ["best of n of sft@v1"],
        ["n = 2", "1.00 [0.00, 2.00]", "≤ 0.19", "–", "–", "–", "–"],
    ]


def test_a_ranking_says_bounds_and_ties() -> None:
    def elo(mean: float, low: float | None, high: float | None) -> dict[str, Any]:
        return {"mean": mean, "low": low, "high": high, "n": 8, "clusters": 8, "method": "wilson"}

    rows = [
        {"name": "ppo@v1", "elo": elo(1353.2, 1353.2, None), "bound": "at least", "ties": 0.0},
        {"name": "dpo@v1", "elo": elo(1100.0, 1050.0, 1150.0), "bound": None, "ties": 0.151},
        {"name": "bad@v1", "elo": elo(650.0, None, 650.0), "bound": "at most", "ties": 0.02},
    ]
    points = Points()
    made = page({"rows": [], "ranking": {"separable": True, "rows": rows}}, points)
    section = next(item for item in parsed(made).iter("section") if item.attrib["id"] == "ranking")
    lines = [["".join(cell.itertext()).strip() for cell in line] for line in section.iter("tr")][1:]
    assert [(line[1], line[2], line[4]) for line in lines] == [
        ("ppo@v1", "≥ 1,353", "0 %"),
        ("dpo@v1", "1,100 [1,050, 1,150]", "15 %"),
        ("bad@v1", "≤ 650", "2 %"),
    ]
    assert "no Elo is the most likely one" in "".join(section.itertext())
    assert points.tables["ranking"][1][0] == ["ppo@v1", 1353.2, None, None, "at least", 0.0]


def test_seeds_are_put_together_by_what_the_results_say_of_them() -> None:
    def row(seed: int, reward: float) -> dict[str, Any]:
        metrics = {"true_reward": {"mean": reward}}
        return {"name": f"p{seed}", "arm": "ppo", "seed": seed, "setting": {"beta": 0.5}, "metrics": metrics}

    def cells(results: dict[str, Any]) -> str:
        table = next(parsed(page(results, Points())).iter("table"))
        return ["".join(cell.itertext()).strip() for cell in list(table.iter("tr"))[1]][1]

    results = {"seeds": [0, 1, 2], "rows": [row(0, 1.0), row(1, 2.0), row(2, 6.0)]}
    assert cells(results) == "3.00 (1.00 … 6.00)"  # nothing is known but the seeds themselves
    found = {"mean": 3.0, "low": -3.57, "high": 9.57, "method": "t over seeds"}
    results["summary"] = [{"arm": "ppo", "setting": {"beta": 0.5}, "metrics": {"true_reward": found}}]
    assert cells(results) == "3.00 [−3.57, 9.57]"


def test_every_plotted_point_is_in_a_csv(full_report: Path) -> None:
    results = full()
    points = rows_of(full_report / "points" / "frontier.csv")
    wanted = [
        (arm, f"beta={p['setting']['beta']}", str(p["seed"]), p["kl"]["mean"], p["reward"]["low"], p["reward"]["high"])
        for final in (True, False)
        for arm, entry in results["frontier"]["arms"].items()
        for p in entry["points"]
        if (p["step"] is None) is final
    ]
    assert len(wanted) == 2 * 2 * 2 * 2  # arms, betas, seeds, a model and its snapshot
    found = [
        (p["arm"], p["setting"], p["seed"], float(p["kl"]), float(p["true_reward_low"]), float(p["true_reward_high"]))
        for p in points[: len(wanted)]
    ]
    assert found == wanted  # to the last digit
    rest = points[len(wanted) :]
    assert [p["model"] for p in rest] == ["sft@v1", "", ""]
    assert [float(p["kl"]) for p in rest[1:]] == pytest.approx([math.log(n) - (n - 1) / n for n in (2, 4)], rel=1e-5)
    curves = rows_of(full_report / "points" / "curves.csv")
    expected = [
        (model, name, float(step), value)
        for model, metrics in results["curves"].items()
        for name, line in metrics.items()
        for step, value in line
    ]
    assert sorted((p["model"], p["metric"], float(p["step"]), float(p["value"])) for p in curves) == sorted(expected)
    bins = rows_of(full_report / "points" / "calibration.csv")
    assert [[float(p[key]) for key in ("confidence", "accuracy", "pairs")] for p in bins] == [
        list(map(float, row)) for entry in results["preferences"]["scorers"].values() for row in entry["bins"]
    ]
    contrasts = rows_of(full_report / "points" / "contrasts.csv")
    assert len(contrasts) == len(results["contrasts"]) and contrasts[0]["primary"] == "1"
    assert len(rows_of(full_report / "points" / "ranking.csv")) == 1 + 8 + 8
    assert len(rows_of(full_report / "points" / "overoptimisation.csv")) == 4 + 4  # a setting and its snapshot, by arm


def drawn(text: str, ident: str) -> list[str]:
    """The colours of the markers in one figure."""
    for svg in parsed(text).iter(f"{SVG}svg"):
        if svg.get("aria-labelledby", "").startswith(f"{ident}-title"):
            styles = [item.get("style", "") for item in svg.iter(f"{SVG}use")]
            markers = [style for style in styles if "opacity" not in style]  # bands are opaque in part
            return [re.search(r"(?:fill|stroke):var\(--(hue-\d|muted)\)", style).group(1) for style in markers]
    raise AssertionError(ident)


def test_the_figure_shows_as_many_points_as_the_csv_has(text: str) -> None:
    for ident in ("frontier-figure", "frontier-figure-narrow"):
        colours = drawn(text, ident)
        assert {hue: colours.count(hue) for hue in set(colours)} == {"hue-0": 4, "hue-1": 4, "hue-2": 2, "muted": 1}


def test_files_of_an_earlier_report_go(tmp_path: Path) -> None:
    write_report(plain(), tmp_path)
    assert (tmp_path / "points" / "ranking.csv").is_file()
    (tmp_path / "points" / "notes.txt").write_text("mine")
    write_report(plain() | {"ranking": None}, tmp_path)
    tables = ("calibration", "contrasts", "cost", "curves", "frontier", "frontier_lines", "responses")
    assert {path.name for path in (tmp_path / "points").iterdir()} == {*(f"{name}.csv" for name in tables), "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "points"}


def command(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_makes_the_page_again(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = tmp_path / "reports" / "small"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(plain()))
    code, out, _ = command(capsys, "report", "small", "--home", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (0, {"path": str(folder / "index.html")})
    assert (folder / "index.html").read_text(encoding="utf-8") == page(plain(), Points())
    code, out, _ = command(capsys, "report", "small", "--home", str(tmp_path))
    assert (code, out.split()) == (0, ["report", str(folder / "index.html")])


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    code, _, err = command(capsys, "report", "x", "--home", str(tmp_path))
    assert code == 2 and "there are none yet" in err
    folder = tmp_path / "reports" / "frontier"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"name": ')
    code, _, err = command(capsys, "report", "fronteir", "--home", str(tmp_path))
    assert code == 2 and "did you mean 'frontier'?" in err
    code, _, err = command(capsys, "report", "../reports/frontier", "--home", str(tmp_path))
    assert code == 2 and "no report '../reports/frontier'" in err
    code, _, err = command(capsys, "report", "frontier", "--home", str(tmp_path))
    assert code == 2 and "results.json" in err and "compare again" in err
    (folder / "results.json").write_text("[]")
    code, _, err = command(capsys, "report", "frontier", "--home", str(tmp_path))
    assert code == 2 and "found list, expected an object" in err
    assert not (folder / "index.html").exists()
