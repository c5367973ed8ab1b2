"""Results of two comparisons that took place, for the tests of the report, and the ways in which tests change them.

Both are the demo, cut short; the commands that made them stand in `COMMANDS`. To make them again, run these with
`--home HOME`, then `python -m tests.report.report_fixture HOME`, which trims the two results.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
SHORT = (
    "sft.max_steps=250 pairs.num=8000 reward.max_steps=80 judge.max_steps=80 ppo.max_steps=20 dpo.max_steps=80 "
    "compare.samples=4 compare.max_prompts=16 compare.best_of=[2,4] compare.reward_model_prompts=1 "
    "compare.shown_prompts=2"
)
COMMANDS = {
    "frontier": "rlhf run configs/demo/frontier.yaml seeds=[0,1] sweep.ppo.kl_coef=[.3,1] sweep.dpo.beta=[.3,1] "
    f"{SHORT} compare.snapshots=true ppo.snapshot_steps=[10] dpo.snapshot_steps=[40]",
    "demo": f"rlhf run configs/demo/experiment.yaml {SHORT}",
}
DIGITS = 6
FRONTIER_POINTS = 32
ARMS, BETAS, SEEDS, STEPS = ("ppo", "dpo"), (0.3, 1.0), (0, 1), {"ppo": 10, "dpo": 40}


def _read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def full() -> dict[str, Any]:
    """Two arms at two betas with two seeds and a snapshot of each run, best of 2 and 4: every section."""
    return _read("frontier")


def plain() -> dict[str, Any]:
    """One model of each arm and the baseline: no sweep, no seeds, no snapshots."""
    return _read("demo")


def judged_by_llm(results: dict[str, Any], low: float = 0.61) -> dict[str, Any]:
    """The results with a language model's verdicts; `low`: the lower end of its agreement with the labels."""
    figures = {"comparisons": 16, "ties": 0.25, "first_place": 0.75, "disagreed": 0.125, "unreadable": 1}
    interval = {"low": 0.4, "high": 0.8, "n": 16, "clusters": 16, "method": "Wilson"}
    results["llm_judge"] = {
        "judge": "llm-judge:tiny",
        "endpoint": "http://127.0.0.1:8000/v1",
        "pairs_per_prompt": 1,
        "pairs": [
            {"a": "ppo", "b": "sft", "estimate": {"mean": 0.6, **interval}, "why_not": None, "p": 0.031, **figures},
            {"a": "dpo", "b": "<sft>", "estimate": None, "why_not": "too few samples", "p": None, **figures},
        ],
        "labels": {
            **figures,
            "pairs": 64,
            "prompts": 32,
            "accuracy": {"mean": 0.7, **interval, "low": low},
        },
        "why_no_labels": None,
    }
    return results


def judged_by_people(results: dict[str, Any], low: float = 0.56) -> dict[str, Any]:
    """The results with people's verdicts; `low`: the lower end of the judge's agreement with them."""

    def interval(mean: float, low: float | None, high: float | None, method: str = "wilson") -> dict[str, Any]:
        return {"mean": mean, "low": low, "high": high, "n": 90, "clusters": 3, "method": method}

    names = [row["model"] for row in results["rows"] if row["stage"] in ("sft", "ppo", "dpo")][:3]
    counts = {"comparisons": 90, "prompts": 30, "labelers": 3}
    results["human"] = {
        "project": "people",
        "prompts": 30,
        "labelers": 3,
        "comparisons": 180,
        "ties": 0.125,
        "skipped": 4,
        "missing": ["<other>"],
        "pairs": [
            {
                "a": names[1],
                "b": names[0],
                **counts,
                "why_not": None,
                "p": 0.012,
                "ties": 0.25,
                "estimate": interval(0.7, 0.55, 0.81),
                "among_these": interval(0.7, 0.6, 0.79),
                "judges": {"judge": interval(0.66, 0.5, 0.8)},
            },
            {
                "a": names[2],
                "b": names[0],
                **counts,
                "why_not": None,
                "p": 0.4,
                "ties": 0.0,
                "estimate": interval(0.45, 0.3, 0.61),
                "among_these": interval(0.45, 0.35, 0.55),
                "judges": {"judge": interval(0.52, 0.4, 0.64)},
            },
            {
                "a": names[1],
                "b": names[2],
                "comparisons": 0,
                "prompts": 0,
                "labelers": 0,
                "p": None,
                "estimate": None,
                "among_these": None,
                "why_not": "never <compared>",
                "ties": None,
            },
        ],
        "standings": [
            {"name": names[1], "comparisons": 90, "elo": interval(1147.2, 1010.0, None), "bound": "at least"},
            {"name": names[0], "comparisons": 180, "elo": interval(1000.0, 1000.0, 1000.0), "bound": None},
            {"name": names[2], "comparisons": 90, "elo": None, "bound": "at most"},
        ],
        "why_no_standings": None,
        "agreement": [
            {
                "figure": "judge",
                "judge": "judge@v1",
                "comparisons": 150,
                "p": 0.02,
                "share": interval(0.64, low, 0.72),
            }
        ],
        "why_no_agreement": None,
    }
    return results


def finals(results: dict[str, Any]) -> dict[str, Any]:
    """The results without the snapshots, their points and their places in the ranking."""
    results["rows"] = [row for row in results["rows"] if row.get("step") is None]
    results["ranking"]["rows"] = [row for row in results["ranking"]["rows"] if row["step"] is None]
    for entry in results["frontier"]["arms"].values():
        entry["points"] = [point for point in entry["points"] if point["step"] is None]
    return results


def without_judge(results: dict[str, Any]) -> dict[str, Any]:
    """The results as they are without a judge and without best of n."""
    results["judge"] = None
    results["rows"] = [row for row in results["rows"] if row["stage"] != "best-of-n"]
    for entry in [*results["rows"], *results["summary"]]:
        entry["metrics"].pop("judge", None)
    results["contrasts"] = [entry for entry in results["contrasts"] if entry["figure"] != "judge"]
    return results


def not_comparable(results: dict[str, Any]) -> dict[str, Any]:
    """The results of arms that differ in their prompts, compared all the same."""
    values = {"ppo": "3,840 prompts", "dpo": "3,712 prompts"}
    results["comparable"] = {
        "ok": False,
        "differences": [{"what": "training prompts", "values": values}],
        "allowed": True,
    }
    return results


def without_kl(results: dict[str, Any]) -> dict[str, Any]:
    """The results as they are without a reference to measure KL to."""
    for entry in [*results["rows"], *results["summary"]]:
        entry["metrics"] = {name: value for name, value in entry["metrics"].items() if not name.startswith("kl")}
    results["contrasts"] = [entry for entry in results["contrasts"] if entry["figure"] != "kl"]
    return results | dict.fromkeys(("reference", "frontier", "overoptimisation", "exact"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def trimmed(results: dict[str, Any]) -> dict[str, Any]:
    """The results with fewer digits, a thinner exact frontier and without the place where they were made."""
    folder = f"rlhf_home/reports/{results['name']}"
    results |= {"path": f"{folder}/results.json", "report": f"{folder}/index.html"}
    for curve in (results["frontier"]["gibbs"], results["exact"]["frontier"]):
        stride = -(-len(curve["kl"]) // FRONTIER_POINTS)
        curve |= {key: curve[key][::stride] for key in ("kl", "reward", "beta")}
    return _rounded(results)


if __name__ == "__main__":
    for name in COMMANDS:
        found = json.loads((Path(sys.argv[1]) / "reports" / name / "results.json").read_text(encoding="utf-8"))
        text = json.dumps(trimmed(found), ensure_ascii=False, separators=(",", ":")).replace('},{"', '},\n{"')
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
