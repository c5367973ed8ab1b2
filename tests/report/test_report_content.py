"""What the report shows: a section for everything there are data for, figures as given, every point in a CSV."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import report
from rlhf_pipeline.cli.main import main
from rlhf_pipeline.report import Results, figures, results, sides, write_report
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.sections.curves import PANELS
from rlhf_pipeline.report.sections.verdict import TOPICS
from tests.report.report_fixture import (
    full,
    judged_by_llm,
    judged_by_people,
    not_comparable,
    plain,
    without_judge,
    without_kl,
)
from tests.report.report_fixture_page import SECTIONS, SVG, page_of, parsed, rows_of, sections


@pytest.fixture(scope="module")
def text(full_report: Path) -> str:
    return (full_report / "index.html").read_text(encoding="utf-8")


ALWAYS = {"verdict", "fair", "results", "responses", "glossary"}


def bare(results: dict[str, Any]) -> dict[str, Any]:
    """The results with nothing that can be absent."""
    for absent in SECTIONS.values():
        results |= absent
    results["rows"] = [row | {"cost": None, "diversity": None} for row in results["rows"]]
    results["arms"] = {arm: entry | {"cost": None} for arm, entry in results["arms"].items()}
    lists = ("contrasts", "win_rates", "summary", "resampled", "data", "seeds")
    return results | {key: [] for key in lists} | dict.fromkeys(("reference", "reward_model", "judge", "command"))


@pytest.mark.parametrize("ident", [ident for ident, absent in SECTIONS.items() if absent])
def test_a_section_is_there_when_its_data_are(ident: str) -> None:
    present = {key: value for key, value in full().items() if key in SECTIONS[ident]}
    assert sections(page_of(bare(full()) | present)) == ALWAYS | {ident}


def test_what_is_absent_has_no_section() -> None:
    assert sections(page_of(bare(full()))) == ALWAYS


def test_everything_is_there(text: str) -> None:
    assert sections(text) == set(SECTIONS)
    order = [item.attrib["id"] for item in parsed(text).iter("section")]
    assert order == list(SECTIONS)
    links = [item.attrib["href"] for item in parsed(text).find(".//nav").iter("a")]
    assert links == [f"#{ident}" for ident in order[1:]]


def without_intervals(value: Any) -> Any:
    """The same with intervals of infinite length, as of a single prompt."""
    if isinstance(value, dict):
        ends = {"low": None, "high": None} if {"mean", "low", "high"} <= set(value) else {}
        return {key: without_intervals(entry) for key, entry in value.items()} | ends
    return [without_intervals(entry) for entry in value] if isinstance(value, list) else value


def without_primary(results: dict[str, Any]) -> dict[str, Any]:
    """The results where nothing says how good a response is: neither the truth nor a judge nor a reward model."""
    results = without_judge(bare(results) | {"arms": {}, "primary": None})
    for row in results["rows"]:
        row["win_rate"] = row["ties"] = row["difference"] = row["gain_in_sd"] = None
        row["metrics"] = {key: value for key, value in row["metrics"].items() if key not in ("true_reward", "score")}
    return results


def single_arm(results: dict[str, Any]) -> dict[str, Any]:
    """One arm of one seed against the baseline: there is nothing to contrast it with."""
    rows = [row for row in results["rows"] if row.get("arm") != "ppo" and row.get("seed") in (0, None)]
    arms = {"dpo": results["arms"]["dpo"]}
    frontier = results["frontier"] | {"arms": {"dpo": results["frontier"]["arms"]["dpo"]}}
    frontier |= {"matched_kl": None, "common_range": None}
    found = {"rows": rows, "arms": arms, "frontier": frontier, "contrasts": [], "ranking": None, "seeds": [0]}
    return results | found | {"overoptimisation": None, "preferences": None}


def faults_of(text: str) -> set[str]:
    """Words of the page that only a fault of ours writes; configs apart."""
    said = " ".join("".join(parsed(text).itertext()).split())
    return set(re.findall(r"\bNone\b|\bnan\b|\binf\b|\[\]|\{\}", said.partition("How to reproduce")[0]))


ODD = {
    "bare": lambda: bare(full()),
    "no intervals": lambda: without_intervals(full()),
    "no judge": lambda: without_judge(full()),
    "no KL": lambda: without_kl(full()),
    "no primary figure": lambda: without_primary(full()),
    "one arm of one seed": lambda: single_arm(full()),
    "arms that differ": lambda: not_comparable(plain()),
}


@cache
def odd(name: str) -> str:
    """The page of an odd comparison; its training curves, which take longest to draw, are those of others."""
    return page_of(ODD[name]() | {"curves": {}})


@pytest.mark.check
@pytest.mark.parametrize("name", ODD)
def test_odd_comparisons_have_a_page(name: str) -> None:
    assert faults_of(odd(name)) == set() and sections(odd(name)) >= ALWAYS


def test_odd_comparisons_show_what_they_have() -> None:
    assert "frontier" not in sections(odd("no KL")) and "frontier" in sections(odd("no judge"))
    assert "KL" not in lines_of(odd("no KL"))[0] and "KL" in lines_of(odd("no judge"))[0]
    assert "primary figure" not in odd("no primary figure") and "primary figure" in odd("bare")
    assert "★" not in odd("no primary figure") and "★" in odd("bare")
    assert {"frontier", "cost", "exact"} <= sections(odd("one arm of one seed"))
    assert "Differences between the arms" not in odd("one arm of one seed")
    assert "no intervals" in odd("no intervals") and "no intervals" not in odd("no judge")


@pytest.mark.check
def test_over_optimisation_that_was_found_has_its_peak() -> None:
    found = full() | {"curves": {}}
    entry = found["overoptimisation"]["dpo"]
    entry["fit"] = {"form": "rl", "alpha": 2.0, "beta": 1.0, "peak": 1.5, "least": 0.5, "largest": 2.0}
    entry["fit"] |= {"points": 4, "residual": 0.0}
    assert "dpo: no over-optimisation found" in said_by(found) and "peak at KL" not in said_by(found)
    entry |= {"found": True, "why": "it falls"}
    said = said_by(found)
    assert "dpo: over-optimised: the gold reward falls while the reward model's score rises (it falls)" in said
    assert "α 2.00, β 1.00, peak at KL 2.25." in said


@pytest.mark.check
def test_infinite_intervals_are_drawn_as_points() -> None:
    points = Points()
    page_of(without_intervals(plain()) | {"curves": {}}, points)
    columns, rows = points.tables["frontier"]
    ends = [list(columns).index(name) for name in ("kl_low", "kl_high", "true_reward_low", "true_reward_high")]
    assert rows and all(row[place] is None for row in rows for place in ends)


def lines_of(text: str) -> list[list[str]]:
    """The cells of the page's first table."""
    table = next(parsed(text).iter("table"))
    return [["".join(cell.itertext()).strip() for cell in line] for line in table.iter("tr")]


def said_by(results: dict[str, Any]) -> str:
    return " ".join("".join(parsed(page_of(results)).itertext()).split())


@pytest.mark.check
def test_the_plain_comparison_of_two_models() -> None:
    made = page_of(plain())
    assert sections(made) == set(SECTIONS) - {"overoptimisation"}  # one point is no curve
    said = said_by(plain())
    assert "seed" not in said.partition("Results")[2].partition("Cost")[0] and "snapshot" not in said
    assert "Every model on its own" not in said and "Every model on its own (8)" in said_by(full())


@pytest.mark.check
def test_without_a_judge_no_judge_is_spoken_of() -> None:
    verdict = {"headline": "dpo leads", "certain": False, "lines": []}
    results = without_judge(plain()) | {"verdict": verdict, "configs": {}, "lineage": [], "command": None}
    results["curves"] = {}
    for shown in results["samples_shown"]:
        for response in (entry for found in shown["responses"].values() for entry in found):
            del response["judge"]
    assert "judge" in said_by(plain()) and "judge" not in said_by(results)


@pytest.mark.check
def test_arms_that_differ_in_more_are_named_with_what_differs() -> None:
    said = said_by(not_comparable(plain()))
    assert "No. The arms differ in more than the algorithm. --allow-mismatch was set." in said
    assert "training prompts 3,840 prompts 3,712 prompts" in said.replace("prompts3", "prompts 3")
    assert "Yes. The arms share" in said_by(plain())


def test_every_panel_of_training_is_one_that_a_comparison_writes() -> None:
    written = {name for results in (full(), plain()) for curves in results["curves"].values() for name in curves}
    assert set(PANELS) == written


def by_rloo(results: dict[str, Any]) -> dict[str, Any]:
    """The results, had its arm ppo been trained by RLOO."""
    for row in results["rows"]:
        row["algorithm"] = "rloo" if row.get("arm") == "ppo" else None
    return results


def untrained(results: dict[str, Any]) -> dict[str, Any]:
    """The results, had its arm dpo been in-context DPO."""
    facts = {"method": "icdpo", "source": "pairs", "demonstrations": 2, "pool": 8, "candidates": 3, "kl_is_bound": True}
    for row in results["rows"]:
        row["in_context"] = facts if row.get("arm") == "dpo" else None
    return results


@pytest.mark.check
def test_a_kl_that_is_a_bound_says_so() -> None:
    assert re.search(r"The KL of dpo\S* is an upper bound\.", said_by(untrained(plain())))
    assert "is an upper bound." not in said_by(plain())


@pytest.mark.check
def test_an_arm_says_which_relative_of_ppo_it_is() -> None:
    assert "ppo (RLOO)" in said_by(by_rloo(plain())) and "(RLOO)" not in said_by(plain())


def test_the_page_reads_no_field_that_a_comparison_does_not_have() -> None:
    """Every field of the types that the page reads is one of theirs, and one that a fixture has a value for."""

    def named(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (key for key, entry in value.items() if entry is not None)
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from named(entry)

    known = [one for module in (figures, sides, results) for one in vars(module).values()]
    classes = [one for one in known if isinstance(one, type) and issubclass(one, figures.Part)]
    fields = {name for one in classes for name in one.model_fields}
    folder, read = Path(report.__file__).parent, set()
    for path in [folder / "view.py", folder / "page.py", folder / "points.py", *(folder / "sections").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & fields
    assert {"rows", "peak", "why_not", "length_controlled", "kl_bound", "may_move_optimum"} <= read
    unknown = judged_by_llm(plain())
    unknown["llm_judge"] |= {"labels": None, "why_no_labels": "no pairs"}
    unjudged = judged_by_people(plain())
    unjudged["human"] |= {"standings": [], "why_no_standings": "none", "agreement": [], "why_no_agreement": "none"}
    given = (
        full(),
        plain(),
        not_comparable(plain()),
        judged_by_llm(plain()),
        unknown,
        judged_by_people(plain()),
        unjudged,
        by_rloo(plain()),
        untrained(plain()),
    )
    assert read <= {name for results in given for name in named(results)} | NEVER_IN_A_FIXTURE


@pytest.mark.check
def test_what_people_prefer_stands_beside_the_judges_win_rate_and_agreement() -> None:
    """Every figure with its interval, in the section and in the table of win rates; no markup of names is markup."""
    text = said_by(judged_by_people(plain()))
    assert "In the project people, 3 labelers compared two responses 180 times, on 30 prompts" in text
    assert "Ties: 12 %. Skipped items: 4. It has no responses of <other>." in text
    assert text.count("0.700 [0.550, 0.810]") == 1 and "0.660 [0.500, 0.800]" in text and "never <compared>" in text
    assert "0.70 [0.55, 0.81]" in text  # beside the judge's, among all win rates
    assert "(judge@v1) shares 0.640 [0.560, 0.720] of people's 150 verdicts with a winner, p 0.020: more often" in text
    assert "≥ 1,147" in text or "≥ 1147" in text
    assert "maybe no more often than a coin" in said_by(judged_by_people(plain(), low=0.49))
    unknown = judged_by_people(plain())
    unknown["human"] |= {
        "standings": [],
        "why_no_standings": "not joined",
        "agreement": [],
        "why_no_agreement": "no ids",
    }
    assert "There are none: not joined." in said_by(unknown) and "Not known: no ids." in said_by(unknown)
    assert "Judged by people" not in said_by(plain())


@pytest.mark.check
def test_what_a_language_model_prefers_stands_beside_its_agreement_with_labels() -> None:
    """Both figures with their intervals, its habits, and a warning where it is no better than a coin."""
    text = said_by(judged_by_llm(plain()))
    assert "llm-judge:tiny orders 0.700 [0.610, 0.800] of 64 held-out pairs of 32 prompts as labelled" in text
    assert "more often than a coin" in text and "1 answers without a verdict" in text
    assert "the reply in the first place wins 75 %" in text and "too few samples" in text
    assert "may agree no more often than a coin" in said_by(judged_by_llm(plain(), low=0.48))
    assert "Judged by a language model" not in said_by(plain())


NEVER_IN_A_FIXTURE = {"bound", "peak"}
"""Fields that only other comparisons have a value for: a model that never loses, a fit that turns down."""


def test_every_topic_of_the_verdicts_has_its_words() -> None:
    written = {line["topic"] for results in (full(), plain()) for line in results["verdict"]["lines"]}
    assert {"judge", "cost", "selected", "exact", "limits", "next"} <= written <= set(TOPICS)


def figure(mean: float, low: float | None = None, high: float | None = None, method: str = "t") -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "n": 32, "clusters": 8, "method": method}


def test_figures_as_they_are_printed() -> None:
    cost = dict.fromkeys(("tokens_trained", "tokens_generated", "optimizer_steps", "peak_memory_bytes"), 1.0)
    rows = [
        {
            "name": "sft@v1",
            "model": "sft@v1",
            "arm": "sft@v1",
            "stage": "sft",
            "metrics": {"true_reward": figure(-0.004, -1.5, 1.5)},
        },
        {
            "name": "dpo@v1",
            "model": "dpo@v1",
            "arm": "dpo",
            "stage": "dpo",
            "beta": 0.1,
            "metrics": {"true_reward": figure(1.234, 1.1, 1.356), "kl": figure(2.0, 1.0, 3.0)},
            "win_rate": figure(0.75, 0.5, 1.0),
            "ties": 0.153,
            "cost": {"flops": 1.5e12, "wall_seconds": 200.0, **cost},
        },
        {
            "name": "b",
            "model": "sft@v1",
            "stage": "best-of-n",
            "n": 2,
            "kl_bound": 0.193,
            "metrics": {"true_reward": figure(1, 0, 2)},
        },
    ]
    bill = ["1.50 TFLOP", "3 min 20 s"]
    assert lines_of(page_of(bare(plain()) | {"rows": rows})) == [
        ["arm and setting", "true reward ★", "KL", "win rate", "ties", "FLOPs", "wall time"],
        ["sft@v1", "0.00 [−1.50, 1.50]", "–", "–", "–", "–", "–"],
        ["dpo@v1, β 0.1", "1.23 [1.10, 1.36]", "2.00 [1.00, 3.00]", "0.75 [0.50, 1.00]", "15 %", *bill],
        ["best of n of sft@v1"],
        ["n = 2", "1.00 [0.00, 2.00]", "≤ 0.19", "–", "–", "–", "–"],
    ]


@pytest.mark.check
def test_an_effective_beta_has_a_column_of_its_own() -> None:
    found = plain()
    span = {"mean": 1.1, "low": 0.9, "high": 1.3}
    beta = {"mean": 0.55, "low": 0.45, "high": 0.65, "slope": span, "reward_model": "reward@v1", "why_not": None}
    unknown = beta | {"mean": None, "low": None, "high": None, "why_not": "no pairs"}
    for row in found["rows"]:
        row["effective_beta"] = {"ppo": beta, "dpo": unknown}.get(row["stage"])
    lines = lines_of(page_of(found))
    assert lines[0][1] == "effective β"
    by_name = {line[0].partition(",")[0]: line[1] for line in lines if len(line) > 1}
    ppo, dpo = (next(value for name, value in by_name.items() if name.startswith(arm)) for arm in ("ppo", "dpo"))
    assert (ppo, dpo, by_name["sft@v1"]) == ("0.55 [0.45, 0.65]", "–", "–")


def test_a_ranking_says_bounds_and_ties() -> None:
    def row(name: str, elo: dict[str, Any], bound: str | None, ties: float) -> dict[str, Any]:
        return {"name": name, "arm": name[:3], "step": None, "elo": elo | {"method": "wilson"}} | {
            "bound": bound,
            "ties": ties,
        }

    rows = [
        row("ppo@v1", figure(1353.2, 1353.2), "at least", 0.0),
        row("dpo@v1", figure(1100.0, 1050.0, 1150.0), None, 0.151),
        row("bad@v1", figure(650.0, None, 650.0), "at most", 0.02),
    ]
    points = Points()
    ranking = {"figure": "true_reward", "separable": True, "left_out": 3, "rows": rows}
    made = page_of(bare(plain()) | {"ranking": ranking}, points)
    section = next(item for item in parsed(made).iter("section") if item.attrib["id"] == "ranking")
    lines = [["".join(cell.itertext()).strip() for cell in line] for line in section.iter("tr")][1:]
    assert [(line[1], line[2], line[4]) for line in lines] == [
        ("ppo@v1", "≥ 1,353", "0 %"),
        ("dpo@v1", "1,100 [1,050, 1,150]", "15 %"),
        ("bad@v1", "≤ 650", "2 %"),
    ]
    said = "".join(section.itertext())
    assert "their most likely Elo is not finite" in said and "3 more models were left out." in said
    assert points.tables["ranking"][1][0] == ["ppo@v1", 1353.2, None, None, "at least", 0.0]


def test_seeds_are_put_together_by_what_the_results_say_of_them() -> None:
    def row(seed: int, reward: float) -> dict[str, Any]:
        metrics = {"true_reward": figure(reward)}
        place = {"name": f"p{seed}", "model": f"p{seed}", "arm": "ppo", "stage": "ppo", "seed": seed}
        return place | {"setting": {"beta": 0.5}, "metrics": metrics}

    found = bare(plain()) | {"seeds": [0, 1, 2], "rows": [row(0, 1.0), row(1, 2.0), row(2, 6.0)]}
    assert lines_of(page_of(found))[1][1] == "3.00 (1.00 … 6.00)"  # nothing is known but the seeds themselves
    over_all = figure(3.0, -3.57, 9.57, "t over seeds")
    summary = {"arm": "ppo", "setting": {"beta": 0.5}, "beta": 0.5, "optimum": "same", "effective_beta": None}
    found["summary"] = [summary | {"seeds": 3, "metrics": {"true_reward": over_all}, "method": "t over seeds"}]
    assert lines_of(page_of(found))[1][1] == "3.00 [−3.57, 9.57]"


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


@pytest.mark.check
def test_files_of_an_earlier_report_go(tmp_path: Path) -> None:
    write_report(Results.model_validate(plain()), tmp_path)
    assert (tmp_path / "points" / "ranking.csv").is_file()
    (tmp_path / "points" / "notes.txt").write_text("mine")
    write_report(Results.model_validate(plain() | {"ranking": None}), tmp_path)
    tables = ("calibration", "contrasts", "cost", "curves", "frontier", "frontier_lines", "responses")
    assert {path.name for path in (tmp_path / "points").iterdir()} == {*(f"{name}.csv" for name in tables), "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "points"}


def command(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.check
def test_the_command_makes_the_page_again(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = tmp_path / "reports" / "small"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(plain()))
    code, out, _ = command(capsys, "report", "small", "--home", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (0, {"path": str(folder / "index.html")})
    assert (folder / "index.html").read_text(encoding="utf-8") == page_of(plain())
    code, out, _ = command(capsys, "report", "small", "--home", str(tmp_path))
    assert (code, out.split()) == (0, ["report", str(folder / "index.html")])


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    code, _, err = command(capsys, "report", "x", "--home", str(tmp_path))
    assert code == 2 and "there is no report yet" in err
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
    assert code == 2 and "found no version, expected version 1" in err
    assert not (folder / "index.html").exists()
