"""Snapshots as points of a comparison: which there are, what they cost, and where they count and where they do not."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare import rows
from rlhf_pipeline.compare.aim import Aim
from rlhf_pipeline.compare.arms import arms_of, common_seeds
from rlhf_pipeline.compare.contrasts import compare_arms
from rlhf_pipeline.compare.points import Point, with_snapshots
from rlhf_pipeline.compare.rankings import MOST_RANKED, ranking_section
from rlhf_pipeline.compare.rows import COST_KEYS, Measured, bill
from rlhf_pipeline.compare.verdict import verdict
from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.evaluation.frontier import pareto
from rlhf_pipeline.report.results import Findings
from rlhf_pipeline.report.sides import Sides
from tests.compare.test_contrasts import PROMPTS, contrasts, found, samples
from tests.compare.test_verdict import NOTHING

COUNTS = tuple(key for key in COST_KEYS if key != "wall_seconds")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """PPO and DPO with snapshots, the last one at the last step, and the same runs stopped short by max_steps."""
    lab = tiny.copy(tmp_path_factory.mktemp("snapshots") / "home")
    for stage in ("ppo", "dpo"):
        lab.run(stage, max_steps=4, snapshot_steps=[1, 2, 4], lr_scheduler_type="constant")
        lab.run(stage, output_name=f"{stage}-short", max_steps=2, lr_scheduler_type="constant")
    return lab


# 1. Which points there are.


def test_snapshots_come_before_their_model_and_that_of_the_last_step_is_the_model(runs):
    model = runs.registry.resolve("ppo")
    point = Point("ppo", 3, {"beta": 0.5}, "ppo@v1")
    made = with_snapshots(point, model)
    assert [(one.model, one.step) for one in made] == [("ppo@v1#1", 1), ("ppo@v1#2", 2), ("ppo@v1", None)]
    assert {(one.arm, one.seed, str(one.setting)) for one in made} == {("ppo", 3, "{'beta': 0.5}")}
    assert with_snapshots(point, model, wanted=False) == [point]


def test_a_snapshot_that_is_named_itself_and_a_folder_bring_no_others(runs, tmp_path):
    for reference in ("ppo@v1#1", str(runs.registry.resolve("ppo").path)):
        point = Point("named", None, {}, reference)
        assert with_snapshots(point, runs.registry.resolve(reference)) == [point]


# 2. What they cost.


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_the_bill_at_a_step_is_that_of_a_run_of_so_many_steps(runs, stage):
    registry = runs.registry
    whole, short = (registry.resolve(name).manifest.cost for name in (stage, f"{stage}-short"))
    marked = whole["at_step"]
    assert list(marked) == ["1", "2", "4"] and "at_step" not in short
    assert {key: marked["2"][key] for key in COUNTS} == {key: short[key] for key in COUNTS}
    assert {key: marked["4"][key] for key in COUNTS} == {key: whole[key] for key in COUNTS}
    for key in COST_KEYS:
        spent = [marked[step][key] for step in marked]
        assert spent == sorted(spent) and (spent[0] > 0 or (stage, key) == ("dpo", "tokens_generated"))
    assert [marked[step]["optimizer_steps"] for step in marked] == [n * (4 if stage == "ppo" else 1) for n in (1, 2, 4)]
    assert marked["4"]["wall_seconds"] <= whole["wall_seconds"]


def test_the_bill_of_a_snapshot_holds_its_reward_model_whole(runs):
    registry = runs.registry
    reward = registry.resolve("reward").manifest.cost
    marked = registry.resolve("ppo").manifest.cost["at_step"]["1"]
    for key in COST_KEYS:
        assert getattr(bill(registry, registry.resolve("ppo@v1#1")), key) == pytest.approx(marked[key] + reward[key])
    dpo = registry.resolve("dpo")
    assert bill(registry, registry.resolve("dpo@v1#2")).flops == dpo.manifest.cost["at_step"]["2"]["flops"]


def test_a_snapshot_of_an_earlier_version_has_no_bill(runs):
    resolved = runs.registry.resolve("dpo@v1#1")
    cost = {key: value for key, value in resolved.manifest.cost.items() if key != "at_step"}
    older = SimpleNamespace(manifest=resolved.manifest.model_copy(update={"cost": cost}), step=1, method=None)
    assert bill(runs.registry, older) is None


def test_no_digest_and_no_card_depends_on_the_bill(runs):
    runs.run("dpo", output_name="plain", max_steps=4, lr_scheduler_type="constant")
    plain, marked = (runs.registry.resolve(name) for name in ("plain", "dpo"))
    assert plain.digest == marked.digest == runs.registry.resolve("dpo@v1#4").digest
    assert "at_step" not in (marked.path / "README.md").read_text()


# 3. Where they count: made-up figures.


def point(arm: str, seed: int | None, step: int | None, flops: float | None, beta: float = 0.5, **figures: Any):
    """A model (step None) or a snapshot that cost `flops`; `validation` are its figures on those prompts."""
    validation = figures.pop("validation", None)
    name = f"{arm}-{beta:g}-{seed}" + ("" if step is None else f"#{step}")
    cost = {"flops": flops} if step is None else {"flops": -1.0, "at_step": {str(step): {"flops": flops}}}
    if flops is None:
        cost = {}
    manifest = SimpleNamespace(config={"beta": beta}, cost=cost, parents={}, seed=seed)
    model = SimpleNamespace(label=name, manifest=manifest, step=step, stage="dpo", digest=name, method=None)
    checked = None if validation is None else samples(length=3.0, **validation)
    return Measured(Point(arm, seed, {"beta": beta}, name, step), model, samples(length=3.0, **figures), checked)


def run_of(arm: str, seed: int | None, rewards: dict[int | None, tuple[float, float, float]]) -> list[Measured]:
    """(FLOPs, KL, reward) by step; None is the model at the end. Prompts differ far more than arms."""
    hard = np.linspace(-3, 3, PROMPTS)
    return [
        point(arm, seed, step, flops, kl=kl, true_reward=reward + hard) for step, (flops, kl, reward) in rewards.items()
    ]


A = {1: (100.0, 1.0, 1.0), 2: (200.0, 2.0, 2.0), None: (400.0, 3.0, 4.0)}  # reward: FLOPs / 100
B = {1: (150.0, 0.5, 0.75), 2: (300.0, 1.5, 1.5), None: (600.0, 2.5, 3.0)}  # reward: FLOPs / 200
BASELINE = point("sft", None, None, None, true_reward=0.0, kl=0.0)


def compared(measured: list[Measured]) -> Sides:
    return compare_arms(measured, BASELINE, "true_reward", "auto", SimpleNamespace(resolve=None))


def test_at_equal_flops_the_runs_are_read_where_both_pass():
    made = contrasts([*run_of("a", None, A), *run_of("b", None, B)], swept=False)
    entry = found(made, kind="cost", figure="true_reward")
    # Both reach 150 to 400 FLOPs; in the middle, 275, a has 2.75 and b 1.375.
    assert entry.at == "at 275 FLOPs"
    assert entry.estimate.mean == pytest.approx(1.375, abs=1e-9)
    # KLs that both reach: 1 to 2.5, the middle 1.75. a: 1.75, b: 1.5 + .25 x 1.5 = 1.875.
    entry = found(made, kind="matched KL", figure="true_reward")
    assert (entry.at, entry.estimate.mean) == ("at a KL of 1.75 nats", pytest.approx(-0.125, abs=1e-9))
    # As trained only the ends count: 4 - 3.
    entry = found(made, kind="as trained", figure="true_reward")
    assert entry.estimate.mean == pytest.approx(1.0)
    assert [e.kind for e in made if e.figure == "true_reward"] == ["as trained", "matched KL", "area", "cost"]


def test_a_point_that_a_cheaper_one_beats_on_validation_prompts_is_not_read():
    measured = [
        point("a", None, 1, 100.0, kl=1.0, true_reward=1.0, score=0.0, validation={"kl": 1.0, "score": 1.0}),
        # dearer than step 1 and worse by what a user has; on the test prompts it would be by far the best
        point("a", None, 2, 250.0, kl=2.0, true_reward=99.0, score=0.0, validation={"kl": 2.0, "score": 0.5}),
        point("a", None, None, 400.0, kl=3.0, true_reward=4.0, score=0.0, validation={"kl": 3.0, "score": 2.0}),
        point("b", None, 1, 100.0, kl=1.0, true_reward=0.0, score=0.0, validation={"kl": 1.0, "score": 0.0}),
        point("b", None, None, 400.0, kl=3.0, true_reward=0.0, score=0.0, validation={"kl": 3.0, "score": 1.0}),
    ]
    entry = found(contrasts(measured, chooser="score", swept=False), kind="cost", figure="true_reward")
    assert (entry.at, entry.estimate.mean) == ("at 250 FLOPs", pytest.approx(2.5))
    assert pareto([100.0, 250.0, 400.0], [1.0, 0.5, 2.0]) == [0, 2]


def test_where_there_is_no_cost_to_read_it_says_what_to_do():
    ends = [*run_of("a", None, {None: A[None]}), *run_of("b", None, B)]
    entry = found(contrasts(ends, swept=False), kind="cost", figure="true_reward")
    assert entry.estimate is None
    assert "snapshot_steps in training and snapshots: true in the comparison" in entry.why_not
    older = [*run_of("a", None, {**A, 2: (None, 2.0, 2.0)}), *run_of("b", None, B)]
    entry = found(contrasts(older, swept=False), kind="cost", figure="true_reward")
    assert entry.why_not == "the cost of a point is not known (a-0.5-None#2)"


def test_where_nobody_chooses_among_settings_of_one_cost_nothing_is_read_at_equal_flops():
    both = [*run_of("a", None, A), point("a", None, None, 400.0, beta=1.0, kl=0.5, true_reward=0.0)]
    entry = found(contrasts([*both, *run_of("b", None, B)]), kind="cost", figure="true_reward")
    assert entry.estimate is None and "to choose one of them" in entry.why_not


def test_final_models_alone_are_trials_settings_and_what_is_selected():
    measured = [*run_of("a", 0, A), *run_of("a", 1, A), *run_of("b", 0, B), *run_of("b", 1, B)]
    without = [one for one in measured if one.point.step is None]
    made, plain = compared(measured), compared(without)
    assert made.summary == plain.summary and made.win_rates == plain.win_rates
    assert [made.arms[arm].trials for arm in "ab"] == [1, 1]
    assert [made.arms[arm].snapshots for arm in "ab"] == [4, 4]
    assert [made.arms[arm].settings for arm in "ab"] == [[{"beta": 0.5}]] * 2
    assert made.arms["a"].selected is None and made.arms["a"].cost.flops == 400.0
    # Looking at snapshots changes neither the declared contrast nor what was found as trained.
    assert [e.kind for e in made.contrasts if e.primary] == ["as trained"]
    ours, theirs = ([e for e in x.contrasts if e.kind == "as trained"] for x in (made, plain))
    assert [e.estimate for e in ours] == [e.estimate for e in theirs]
    assert {e.kind for e in plain.contrasts} == {"as trained"}


def test_frontier_overoptimisation_and_ranking_have_all_points():
    measured = [*run_of("a", 0, A), *run_of("b", 0, B)]
    made = compared(measured)
    points = made.frontier.arms["a"].points
    assert [(p.step, p.kl.mean) for p in points] == [(1, 1.0), (2, 2.0), (None, 3.0)]
    assert made.frontier.arms["a"].envelope == [(1.0, 1.0), (2.0, 2.0), (3.0, 4.0)]
    assert made.frontier.common_range == (1.0, 2.5)
    names = {row.name: row.step for row in made.ranking.rows}
    assert names["a-0.5-0#2"] == 2 and names["a-0.5-0"] is None and len(names) == 7


def test_a_snapshot_that_some_seeds_lack_is_left_out_of_the_curve_and_costs_no_seed():
    measured = [*run_of("a", 0, A), *run_of("a", 1, {1: A[1], None: A[None]})]
    (arm,) = arms_of(measured)
    assert common_seeds(arm) == [0, 1]
    assert [setting.step for setting in arm.complete([0, 1])] == [1, None]
    assert arm.curve([0, 1], "true_reward", None).x.shape == (2, 2, PROMPTS)


def test_too_many_to_rank_leaves_out_the_worst_snapshots():
    steps = {step: (float(step), 1.0, float(step)) for step in range(1, MOST_RANKED + 5)}
    measured = run_of("a", 0, {**steps, None: (99.0, 1.0, -9.0)})
    found_ = ranking_section([BASELINE, *measured], "true_reward")
    kept = {row.name for row in found_.rows}
    assert {"sft-0.5-None", "a-0.5-0"} <= kept and len(kept) == MOST_RANKED
    assert {row.step for row in found_.rows} - {None} == set(range(7, MOST_RANKED + 5))
    assert found_.left_out == 6


def test_the_verdict_speaks_of_matched_cost_and_matched_kl():
    results = compared([*run_of("a", 0, A), *run_of("b", 0, B)])
    found_ = Findings(**{**NOTHING, "primary": "true_reward", **dict(results)})
    said = {line.topic: line.text for line in verdict(found_).lines}
    assert said["cost"].startswith("a is ahead of b in true reward at 275 FLOPs: a - b = +1.375")
    assert said["matched KL"].startswith("b is ahead of a in true reward at a KL of 1.75 nats")


def test_other_reward_models_score_the_first_model_and_no_snapshot(monkeypatch):
    """Without a baseline the first arm's model is what all are set against, by the reward model of each seed."""
    monkeypatch.setattr(rows, "kept_samples", lambda *_: samples(score=0.0))
    monkeypatch.setattr(rows, "aim_of", lambda *_: Aim())
    monkeypatch.setattr(rows, "scores_of", lambda samples, source, _: np.full(4, float(source.label[3:])))
    steps = [(0, 1), (0, None), (1, 1), (1, None)]
    points = [(Point("a", seed, {}, "a", step), SimpleNamespace(label="a")) for seed, step in steps]
    plan = SimpleNamespace(decoding=Decoding())
    bench = SimpleNamespace(say=lambda _: None, plan=plan, scorer=None, registry=None)
    scorers = SimpleNamespace(bench=bench, get=lambda seed: SimpleNamespace(label=f"rm-{seed}"))
    measured = rows.measure_points(points, bench, None, scorers)
    assert [sorted(one.scores) for one in measured] == [[], ["rm-1"], [], []]
    assert set(measured[1].scored_by("rm-1").values["score"]) == {1.0}


# 4. The command.


def command(lab, capsys, *words: str) -> Any:
    code = main([*words, "--home", str(lab.home)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


OPTIONS = ("--baseline", "sft", "--samples", "2", "exact=false", "use_cpu=true", "num_threads=1", "shown_prompts=1")


@pytest.mark.check
def test_the_command_adds_them_to_the_curves(runs, capsys, request):
    words = ("compare", "ppo", "dpo", *OPTIONS, "--name", "curves")
    made = json.loads(command(runs, capsys, *words, "--snapshots", "--json"))
    by_name = {row["name"]: row for row in made["rows"]}
    assert [(name, row["step"]) for name, row in by_name.items()] == [
        *(("sft@v1", None), ("ppo@v1", None), ("dpo@v1", None)),
        *(("ppo@v1#1", 1), ("ppo@v1#2", 2), ("dpo@v1#1", 1), ("dpo@v1#2", 2)),
    ]
    spent = [by_name[name]["cost"]["flops"] for name in ("ppo@v1#1", "ppo@v1#2", "ppo@v1")]
    assert spent == sorted(spent) and by_name["ppo@v1#1"]["arm"] == "ppo@v1"
    assert made["validation_split"] == "validation" and made["arms"]["ppo@v1"]["snapshots"] == 2
    for key in ("samples_shown", "curves", "configs"):
        assert "#" not in "".join(made[key][0]["responses"] if key == "samples_shown" else made[key])
    assert {"matched KL", "area", "cost"} <= {entry["kind"] for entry in made["contrasts"]}
    assert any(name.startswith("ppo@v1#") for name in (row["name"] for row in made["ranking"]["rows"]))

    folder = Path(made["path"]).parent
    with (folder / "points" / "frontier.csv").open(newline="") as file:
        steps = {row["model"]: row["step"] for row in csv.DictReader(file)}
    assert steps == {
        "sft@v1": "",
        "ppo@v1": "",
        "dpo@v1": "",
        **{f"{m}@v1#{n}": str(n) for m in ("ppo", "dpo") for n in (1, 2)},
    }
    text = (folder / "index.html").read_text()
    assert "points are 4 snapshots" in text and "the curves also use snapshots" in text
    assert "ppo@v1#1" in text  # in the ranking

    request.getfixturevalue("undrawn")  # one page is enough
    shown = command(runs, capsys, *words, "--snapshots")
    assert "ppo@v1#1" not in shown and "snapshots (used for contrasts" in shown and "ppo@v1 2, dpo@v1 2" in shown
    plain = json.loads(command(runs, capsys, *words, "--json"))
    assert [row["name"] for row in plain["rows"]] == ["sft@v1", "ppo@v1", "dpo@v1"]
    ours = [{key: row[key] for key in ("metrics", "cost", "win_rate") if key in row} for row in made["rows"][:3]]
    assert ours == [{key: row[key] for key in ("metrics", "cost", "win_rate") if key in row} for row in plain["rows"]]


def test_without_a_baseline_the_first_model_is_it_and_no_snapshot(runs, capsys, undrawn):
    words = ("compare", "ppo", "dpo", *OPTIONS[2:], "--name", "bare", "--snapshots", "--json")
    made = json.loads(command(runs, capsys, *words))
    assert made["baseline"] == made["rows"][0]["name"] == "ppo@v1"
    assert "win_rate" not in made["rows"][0] and "win_rate" in made["rows"][1]
