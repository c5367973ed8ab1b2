"""What the report shows: a section for everything there are data for, figures as given, every point in a CSV."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.experiment.report import write_report
from rlhf_pipeline.experiment.report.page import page
from rlhf_pipeline.experiment.report.points import Points
from tests.experiment.report_fixture import full, minimal
from tests.experiment.report_fixture_page import SECTIONS, SVG, parsed, rows_of, sections


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
    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return None if {"mean", "low"} <= set(value) else {k: emptied(v) for k, v in value.items()}
        return [emptied(item) for item in value] if isinstance(value, list) else value

    results = emptied({key: full()[key] for key in full() if key != "curves"})
    made = sections(page(results, Points()))
    assert "frontier" not in made and "ranking" not in made
    assert {"verdict", "results", "cost", "exact", "samples"} <= made


def test_the_plain_comparison_of_two_models(tmp_path: Path) -> None:
    made = write_report(minimal(), tmp_path).read_text(encoding="utf-8")
    assert sections(made) == {"results", "frontier", "responses", "cost", "glossary"}
    said = " ".join("".join(parsed(made).itertext()).split())
    assert "Verdict" not in said and "–" in said


def test_figures_as_they_are_printed() -> None:
    def figure(mean: float, low: float, high: float) -> dict[str, Any]:
        return {"mean": mean, "low": low, "high": high, "n": 32, "clusters": 8, "method": "t"}

    results = {
        "baseline": "sft@v1",
        "prompts": 8,
        "samples": 4,
        "split": "test",
        "rows": [
            {"name": "sft@v1", "stage": "sft", "metrics": {"true_reward": figure(-0.004, -1.5, 1.5)}},
            {
                "name": "dpo@v1",
                "stage": "dpo",
                "beta": 0.1,
                "metrics": {"true_reward": figure(1.234, 1.1, 1.356), "kl": figure(2.0, 1.0, 3.0)},
                "win_rate": figure(0.75, 0.5, 1.0),
                "cost": {"flops": 1.5e12, "wall_seconds": 200.0},
            },
            {"name": "b", "stage": "best-of-n", "n": 2, "kl_bound": 0.193, "metrics": {"true_reward": figure(1, 0, 2)}},
        ],
    }
    table = next(parsed(page(results, Points())).iter("table"))
    lines = [["".join(cell.itertext()).strip() for cell in line] for line in table.iter("tr")]
    assert lines == [
        ["arm and setting", "true reward ★", "KL", "win rate", "training", "wall time"],
        ["sft@v1", "0.00 [−1.50, 1.50]", "–", "–", "–", "–"],
        ["dpo@v1, β 0.1", "1.23 [1.10, 1.36]", "2.00 [1.00, 3.00]", "0.75 [0.50, 1.00]", "1.50 TFLOP", "3 min 20 s"],
        ["best of n of sft@v1"],
        ["n = 2", "1.00 [0.00, 2.00]", "≤ 0.19", "–", "–", "–"],
    ]


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
        for arm, entry in results["frontier"]["arms"].items()
        for p in entry["points"]
    ]
    found = [
        (p["arm"], p["setting"], p["seed"], float(p["kl"]), float(p["true_reward_low"]), float(p["true_reward_high"]))
        for p in points[: len(wanted)]
    ]
    assert found == wanted  # to the last digit
    rest = points[len(wanted) :]
    assert [p["model"] for p in rest] == ["sft@v1", *[""] * 7]
    assert [float(p["kl"]) for p in rest[1:]] == [row["kl_bound"] for row in results["best_of_n"]]
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
    assert len(rows_of(full_report / "points" / "ranking.csv")) == 25
    assert len(rows_of(full_report / "points" / "overoptimisation.csv")) == 12 + 12 + 6


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
        assert {hue: colours.count(hue) for hue in set(colours)} == {"hue-0": 12, "hue-1": 12, "hue-2": 7, "muted": 1}


def test_files_of_an_earlier_report_go(tmp_path: Path) -> None:
    write_report(minimal(), tmp_path)
    (tmp_path / "points" / "ranking.csv").write_text("old")
    (tmp_path / "points" / "notes.txt").write_text("mine")
    write_report(minimal(), tmp_path)
    assert {path.name for path in (tmp_path / "points").iterdir()} == {"frontier.csv", "responses.csv", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "points"}


def command(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_makes_the_page_again(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = tmp_path / "reports" / "small"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(minimal()))
    code, out, _ = command(capsys, "report", "small", "--home", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (0, {"path": str(folder / "index.html")})
    assert (folder / "index.html").read_text(encoding="utf-8") == page(minimal(), Points())
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
