"""Snapshots in the report: on the frontier and against cost, in a long ranking the best ones, in no table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.experiment.report import write_report
from rlhf_pipeline.experiment.report.page import page
from rlhf_pipeline.experiment.report.points import Points
from tests.experiment.report_fixture import full
from tests.experiment.report_fixture_page import SVG, parsed, rows_of

STEPS = (100, 20, 60)  # not in order


def with_snapshots() -> dict[str, Any]:
    """The full results with three snapshots of each run: shares of its reward, KL and bill."""
    results = full()
    models = [row for row in results["rows"] if row["stage"] in ("ppo", "dpo")]
    for row in models:
        for step in STEPS:
            made = copy.deepcopy(row)
            made["step"], made["name"], made["model"] = step, f"{row['name']}#{step}", f"{row['model']}#{step}"
            for figure in ("true_reward", "kl"):
                for end in ("mean", "low", "high"):
                    made["metrics"][figure][end] *= step / 120
            made["cost"]["flops"] *= step / 120
            results["rows"].append(made)
            point = {key: made[key] for key in ("setting", "seed", "step", "model")}
            figures = {"kl": made["metrics"]["kl"], "reward": made["metrics"]["true_reward"]}
            results["frontier"]["arms"][row["arm"]]["points"].append(point | figures)
            elo = {"mean": 1000.0 + step + row["beta"], "low": 900.0, "high": 1200.0}
            results["ranking"]["rows"].append({"name": made["name"], "step": step, "elo": elo})
    return results


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    write_report(with_snapshots(), made)
    return made


def section_of(text: str, ident: str) -> str:
    (found,) = [item for item in parsed(text).iter("section") if item.get("id") == ident]
    return " ".join("".join(found.itertext()).split())


@pytest.fixture(scope="module")
def text(directory: Path) -> str:
    return (directory / "index.html").read_text(encoding="utf-8")


def test_tables_are_those_of_final_models(text: str, full_report: Path) -> None:
    plain = (full_report / "index.html").read_text(encoding="utf-8")
    for ident in ("fair", "curves", "preferences", "responses", "exact", "samples", "lineage", "reproduce"):
        assert section_of(text, ident) == section_of(plain, ident)
    added = " Final models alone; behind the curves stand snapshots too (36 of ppo and 36 of dpo)."
    assert section_of(text, "results").replace(added, "") == section_of(plain, "results")
    assert added in section_of(text, "results")


def test_points_have_their_step(directory: Path) -> None:
    rows = rows_of(directory / "points" / "frontier.csv")
    assert [row["step"] for row in rows[:24]] == [""] * 24
    assert [row["step"] for row in rows[24:96]] == [str(step) for step in STEPS] * 24
    assert {row["note"] for row in rows[24:96]} == {"snapshot"} and rows[96]["note"] == "baseline"
    spent = [row for row in rows_of(directory / "points" / "cost.csv") if row["cost"] == "flops"]
    assert sum(bool(row["step"]) for row in spent) == 72 and len(spent) == 96


def drawn(text: str, ident: str) -> list[str]:
    """The styles of all marks of one figure."""
    for svg in parsed(text).iter(f"{SVG}svg"):
        if svg.get("aria-labelledby", "").startswith(f"{ident}-title"):
            return [item.get("style", "") for item in svg.iter(f"{SVG}use")]
    raise AssertionError(ident)


@pytest.mark.parametrize(("ident", "solid"), [("frontier-figure", 12 + 12 + 7 + 1), ("cost-flops", 24)])
def test_snapshots_are_drawn_lighter_than_models(text: str, ident: str, solid: int) -> None:
    styles = drawn(text, ident)
    assert sum("opacity" not in style for style in styles) == solid
    assert sum("opacity:0.5" in style.replace(" ", "") for style in styles) == 72


def test_a_long_ranking_shows_the_best_snapshot_of_each_arm(directory: Path, text: str) -> None:
    said = section_of(text, "ranking")
    # 1000 + step + beta: the best of each arm is the first seed's at step 100 and beta 3
    assert said.count("#100") == 2 and "#60" not in said and "#20" not in said
    assert "ppo β 3, seed 0 #100" in said and "dpo β 3, seed 0 #100" in said
    shown = "Of the snapshots only the best of each arm is shown (best on these very prompts, so flattered); "
    assert f"{shown}70 more are in the CSV." in said
    assert len(rows_of(directory / "points" / "ranking.csv")) == 25 + 72


def test_a_short_ranking_shows_all() -> None:
    results = {key: value for key, value in with_snapshots().items() if key in ("name", "baseline", "ranking")}
    results["ranking"]["rows"] = [row for row in results["ranking"]["rows"] if "-0-0@" in row["name"]]
    said = section_of(page(results, Points()), "ranking")
    assert said.count("#") == 6 and "only the best" not in said
