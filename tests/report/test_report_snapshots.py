"""Snapshots in the report: on the frontier and against cost, in a long ranking the best ones, in no table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.report import Results, write_report
from tests.report.report_fixture import finals, full
from tests.report.report_fixture_page import SVG, page_of, parsed, rows_of

RUNS = 8  # two arms at two betas with two seeds, a snapshot of each


def with_more_snapshots(results: dict[str, Any]) -> dict[str, Any]:
    """The results with two more snapshots of each run in rows and ranking: 33 entries."""
    for row in [row for row in results["rows"] if row.get("step") is not None]:
        (place,) = [entry for entry in results["ranking"]["rows"] if entry["name"] == row["name"]]
        for number, less in ((1, 500.0), (2, 400.0)):
            changes = {"name": f"{row['name']}{number}", "step": 10 * row["step"] + number}
            results["rows"].append(copy.deepcopy(row) | changes | {"model": changes["name"]})
            elo = {key: value if isinstance(value, str | int) else value - less for key, value in place["elo"].items()}
            results["ranking"]["rows"].append(place | changes | {"elo": elo})
    return results


pytestmark = pytest.mark.check  # each test draws pages, which takes seconds


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    write_report(Results.model_validate(full()), made)
    return made


def section_of(text: str, ident: str) -> str:
    (found,) = [item for item in parsed(text).iter("section") if item.get("id") == ident]
    return " ".join("".join(found.itertext()).split())


@pytest.fixture(scope="module")
def text(directory: Path) -> str:
    return (directory / "index.html").read_text(encoding="utf-8")


def test_tables_are_those_of_final_models(text: str) -> None:
    plain = page_of(finals(full()))
    for ident in ("fair", "curves", "preferences", "responses", "exact", "samples", "lineage", "reproduce"):
        assert section_of(text, ident) == section_of(plain, ident)
    added = " The table shows final models only; the curves also use snapshots (4 of ppo and 4 of dpo)."
    assert section_of(text, "results").replace(added, "") == section_of(plain, "results")
    assert added in section_of(text, "results")


def test_points_have_their_step(directory: Path) -> None:
    rows = rows_of(directory / "points" / "frontier.csv")
    assert [row["step"] for row in rows[:RUNS]] == [""] * RUNS
    assert [row["step"] for row in rows[RUNS : 2 * RUNS]] == ["10"] * 4 + ["40"] * 4  # updates of ppo, steps of dpo
    assert {row["note"] for row in rows[RUNS : 2 * RUNS]} == {"snapshot"} and rows[2 * RUNS]["note"] == "baseline"
    spent = [row for row in rows_of(directory / "points" / "cost.csv") if row["cost"] == "flops"]
    assert sum(bool(row["step"]) for row in spent) == RUNS and len(spent) == 2 * RUNS


def drawn(text: str, ident: str) -> list[str]:
    """The styles of all marks of one figure."""
    for svg in parsed(text).iter(f"{SVG}svg"):
        if svg.get("aria-labelledby", "").startswith(f"{ident}-title"):
            return [item.get("style", "") for item in svg.iter(f"{SVG}use")]
    raise AssertionError(ident)


@pytest.mark.parametrize(("ident", "solid"), [("frontier-figure", RUNS + 2 + 1), ("cost-flops", RUNS)])
def test_snapshots_are_drawn_lighter_than_models(text: str, ident: str, solid: int) -> None:
    styles = drawn(text, ident)
    assert sum("opacity" not in style for style in styles) == solid
    assert sum("opacity:0.5" in style.replace(" ", "") for style in styles) == RUNS


def test_a_long_ranking_shows_the_best_snapshot_of_each_arm(tmp_path: Path) -> None:
    results = with_more_snapshots(full())
    text = write_report(Results.model_validate(results), tmp_path).read_text(encoding="utf-8")
    said = section_of(text, "ranking")
    best = {}
    for entry in sorted(results["ranking"]["rows"], key=lambda entry: entry["elo"]["mean"]):
        if entry["step"] is not None:
            best[entry["arm"]] = next(row for row in results["rows"] if row["name"] == entry["name"])
    assert said.count("#") == 2
    for arm, row in best.items():
        assert f"{arm} β {row['setting']['beta']:g}, seed {row['seed']} #{row['step']}" in said
    shown = "Only the best snapshot of each arm is shown (chosen on these prompts, so its Elo is biased upwards); "
    assert f"{shown}{3 * RUNS - 2} more are in the CSV." in said
    assert len(rows_of(tmp_path / "points" / "ranking.csv")) == 1 + RUNS + 3 * RUNS


def test_a_short_ranking_shows_all(text: str) -> None:
    said = section_of(text, "ranking")
    assert said.count("#") == RUNS and "Only the best" not in said
