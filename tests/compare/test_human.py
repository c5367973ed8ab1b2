"""People's verdicts beside the scorers', from a labelling project to results.json and the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.compare.run import run_compare
from rlhf_pipeline.compare.verdict import verdict
from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.experiment.done import comparison_inputs
from rlhf_pipeline.labelling.kinds import Item, RankAction, Response, SubmitAction
from rlhf_pipeline.labelling.store import LabelStore, database
from rlhf_pipeline.measure.bench import find_policies, set_up
from rlhf_pipeline.measure.evaluate import measure
from rlhf_pipeline.report import load
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.results import Findings
from rlhf_pipeline.report.sides import HumanAgreement, HumanJudged, HumanPair
from rlhf_pipeline.rollout.rewards import world_verdicts
from tests.rollout.llm_server import longer_wins, serving


@pytest.fixture(scope="module")
def labelled(tiny, tmp_path_factory):
    """A home with an arena of dpo and sft, in which Ann prefers by the true reward and Bob always dpo; the bench."""
    lab = tiny.copy(tmp_path_factory.mktemp("human") / "home")
    lab.run("dpo", max_steps=2)
    config = lab.config("compare", samples=1, arms=["dpo"], baseline="sft", reward_model="reward")
    models = find_policies(lab.registry, ["dpo", "sft"], lambda _: None)
    options = {"reference": None, "samples": 1, "say": lambda _: None}
    sides = []
    for seed, model in enumerate(models):
        bench = set_up(lab.registry, config, models[0], torch.device("cpu"), seed=seed, **options)
        sides.append(measure(bench, bench.policy(model)).examples)
    items = []
    for number, both in enumerate(zip(*sides, strict=True)):
        responses = [
            Response(text="t", source=name, ids=one.completions[0], ended=one.ended[0])
            for name, one in zip(("dpo@v1", "sft@v1"), both, strict=True)
        ]
        columns = {"prompt_ids": both[0].prompt_ids}
        items.append(
            Item(number=number, kind="arena", prompt=both[0].prompt_text, responses=responses, columns=columns)
        )
    rewards = [world_verdicts(one).reward for one in sides]
    ranks = [[1 + int(a < b), 1 + int(b < a)] for a, b in zip(*rewards, strict=True)]
    project = LabelConfig(name="people", arena=("dpo@v1", "sft@v1"), prompts="world:verdicts", overlap=2)
    with LabelStore.create(database(lab.home, "people"), project, items) as store:
        for name in ("Ann", "Bob"):
            for _ in items:
                label(store, name, ranks if name == "Ann" else [[1, 2]] * len(items))
    return lab, bench, sides, ranks


def label(store: LabelStore, name: str, ranks: list[list[int]]) -> None:
    labeler = store.labeler(name)
    task = store.task(labeler)
    store.record(labeler, task.task, RankAction(ranks=ranks[task.item]), f"{labeler}-{task.task}-r")
    store.record(labeler, task.task, SubmitAction(), f"{labeler}-{task.task}-s")


@pytest.mark.check
def test_their_verdicts_stand_beside_those_of_the_scorers(labelled):
    lab, bench, sides, ranks = labelled
    with serving(longer_wins) as server:
        judge = {"endpoint": server.endpoint, "model": "tiny", "label_pairs": 0}
        given = {"arms": ["dpo"], "baseline": "sft", "human": "people", "reward_model": "reward", "llm_judge": judge}
        results = run_compare(lab.config("compare", **given, max_prompts=4, samples=2), lab.home, quiet=True)
    human = load(results.path).human
    assert human == results.human
    assert (human.project, human.comparisons, human.labelers, human.missing) == ("people", 2 * len(ranks), 2, [])
    # Ann by the true reward, Bob always for dpo, which is the second of the models: the baseline comes first.
    ann = [0.5 * (1 + (two < one) - (one < two)) for one, two in ranks]  # for sft
    (pair,) = human.pairs
    assert (pair.a, pair.b) == ("sft@v1", "dpo@v1")
    assert pair.estimate.mean == pytest.approx(sum(ann) / (2 * len(ann)))
    assert pair.judges["true_reward"].mean == pytest.approx(sum(ann) / len(ann))
    # Of the verdicts with a winner: each of Ann's agrees with the true reward, Bob's where Ann's does not say sft.
    by_prompt = [[1.0, float(one == 0.0)] if one != 0.5 else [0.5] for one in ann]
    shares = {one.figure: one for one in human.agreement}
    assert set(shares) == {"score", "true_reward", "llm_judge"}
    expected = sum(sum(values) / len(values) for values in by_prompt) / len(by_prompt)
    assert shares["true_reward"].share.mean == pytest.approx(expected)
    assert shares["true_reward"].comparisons == sum(map(len, by_prompt))
    # The reward model scores one response at a time here.
    scores = [[float(bench.scorer.score([one])[0]) for one in side] for side in sides]
    gaps = [0.5 * (1 + (one < two) - (two < one)) for one, two in zip(*scores, strict=True)]
    assert pair.judges["score"].mean == pytest.approx(sum(gaps) / len(gaps))
    assert pair.judges["llm_judge"].mean == 0.5  # both texts are "t"
    page = Path(results.report).read_text()
    assert "Judged by people" in page and "people_elo.csv" in page
    assert {line.topic for line in results.verdict.lines} >= {"human"}


@pytest.mark.check
def test_a_new_label_makes_the_comparison_a_new_one(labelled, tmp_path):
    lab = labelled[0].copy(tmp_path / "home")
    config = lab.config("compare", arms=["dpo"], baseline="sft", human="people")
    points = [Point("dpo", None, {}, "dpo@v1")]
    before = comparison_inputs(config, points, [], lab.registry)
    assert before == comparison_inputs(config, points, [], lab.registry)
    with LabelStore.open(database(lab.home, "people")) as store:
        store.back(1, 1)
    assert before != comparison_inputs(config, points, [], lab.registry)


@pytest.mark.check
def test_a_project_of_other_models_is_refused_before_anything_is_sampled(labelled, monkeypatch):
    lab, *_ = labelled

    def never(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr("rlhf_pipeline.evaluation.sampled.sample_for_prompts", never)
    for project, arms, message in (
        ("peopel", ["dpo", "sft"], "one of people"),
        ("people", ["dpo", "tuned"], r"people compares dpo@v1, sft@v1.*two of the compared models: dpo@v1, tuned@v1"),
    ):
        if "tuned" in arms:
            lab.run("sft", max_steps=1, max_train_samples=8)
        config = lab.config("compare", arms=arms, human=project, allow_mismatch=True)
        with pytest.raises(ConfigError, match=message):
            run_compare(config, lab.home, quiet=True)


def test_a_project_that_is_not_there_is_found_by_dry_runs_and_before_an_experiment(lab, tmp_path, capsys):
    assert main(["compare", "sft", "reward", "--human", "people", "--dry-run", "--home", str(lab.home)]) == 2
    assert "rlhf label --arena sft reward --name people --prompts SOURCE" in " ".join(capsys.readouterr().err.split())
    stage = {"stage": "dpo", "model_name_or_path": "sft", "dataset_name": "collected:pairs", "max_steps": 1}
    content = {"name": "trial", "stages": {"dpo": stage}, "compare": {"arms": ["dpo"], "baseline": "sft", "human": "x"}}
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(content))
    assert main(["run", str(path), "--home", str(lab.home)]) == 2
    assert "compare.human: found 'x', and no such project" in " ".join(capsys.readouterr().err.split())
    assert lab.registry.models.numbers("dpo") == []


def share(mean: float, low: float, high: float) -> Interval:
    return Interval(mean=mean, low=low, high=high, n=60, clusters=3, method="wilson over prompts and labelers")


def test_the_verdict_says_what_people_prefer_and_who_agrees_with_them():
    from tests.report.report_fixture import plain

    base = Findings.model_validate({key: value for key, value in plain().items() if key in Findings.model_fields})

    def pair(a: str, mean: float, low: float, high: float, p: float, labelers: int = 3) -> HumanPair:
        counts = {"comparisons": 60, "prompts": 20, "labelers": labelers, "ties": 0.0, "why_not": None}
        return HumanPair(a=a, b="sft", estimate=share(mean, low, high), among_these=None, p=p, **counts)

    never = HumanPair(
        a="x",
        b="y",
        comparisons=0,
        prompts=0,
        labelers=0,
        estimate=None,
        among_these=None,
        why_not="never met",
        p=None,
        ties=None,
    )
    pairs = [pair("ppo", 0.7, 0.6, 0.8, 0.01), pair("dpo", 0.4, 0.3, 0.499, 0.04, 1), pair("kto", 0.5, 0.4, 0.6, 0.9)]
    agreement = [
        HumanAgreement(figure="judge", judge="judge@v1", comparisons=40, share=share(0.65, 0.55, 0.74), p=0.01),
        HumanAgreement(figure="score", judge="reward@v1", comparisons=40, share=share(0.35, 0.26, 0.45), p=0.01),
    ]
    human = HumanJudged(
        project="people",
        prompts=20,
        labelers=3,
        comparisons=180,
        ties=0.0,
        skipped=0,
        missing=[],
        pairs=[*pairs, never],
        standings=[],
        why_no_standings="-",
        agreement=agreement,
        why_no_agreement=None,
    )
    said = [
        (one.text, one.certain)
        for one in verdict(base.model_copy(update={"human": human})).lines
        if one.topic == "human"
    ]
    # Holm: .01 x 3 = .03, then .04 x 2 = .08.
    assert said == [
        ("people prefer ppo to sft: ppo has the win rate 0.70 [0.60, 0.80], 60 comparisons by 3 labelers", True),
        (
            "people prefer sft to dpo: dpo has the win rate 0.40 [0.30, 0.50], 60 comparisons by one labeler, which "
            "says nothing about others; not significant after the correction for several pairs (Holm p = 0.08)",
            False,
        ),
        ("people: cannot tell kto from sft: win rate 0.50 [0.40, 0.60], 60 comparisons by 3 labelers", False),
        ("cannot tell x from y: never met", False),
        ("judge@v1 shares 0.65 [0.55, 0.74] of people's 40 verdicts with a winner, more often than a coin", True),
        (
            "reward@v1 shares 0.35 [0.26, 0.45] of people's 40 verdicts with a winner, maybe no more often than a coin",
            False,
        ),
    ]
    assert not [one for one in verdict(base).lines if one.topic == "human"]


@pytest.mark.check
def test_from_the_command_that_samples_an_arena_to_the_verdict(labelled, tmp_path, capsys, undrawn):
    """`rlhf label --arena` samples responses that scorers read; a decided arena is in the verdict."""
    lab = labelled[0].copy(tmp_path / "home")
    sampled = ["use_cpu=true", "num_threads=1", "response_length=4", "max_prompt_length=6", "overlap=2"]
    command = ["label", "--arena", "dpo", "sft", "--prompts", "world:verdicts", "--num", "20", "--name", "duel"]
    assert main([*command, "--no-serve", "--home", str(lab.home), *sampled]) == 0
    capsys.readouterr()
    with LabelStore.open(database(lab.home, "duel")) as store:
        sources = [[one.source for one in item.responses] for item in store.items()]
        assert all(sorted(names) == ["dpo@v1", "sft@v1"] for names in sources) and len(sources) == 20
        ranks = [[1 + (name == "sft@v1") for name in names] for names in sources]
        for name in ("Ann", "Bob"):
            for _ in sources:
                label(store, name, ranks)
    command = ["compare", "dpo", "--baseline", "sft", "--human", "duel", "--max-prompts", "4", "--samples", "2"]
    assert main([*command, "exact=false", "use_cpu=true", "--json", "--home", str(lab.home)]) == 0
    results = json.loads(capsys.readouterr().out)
    (pair,) = results["human"]["pairs"]
    assert (pair["comparisons"], pair["prompts"], pair["estimate"]["mean"]) == (40, 20, 0.0)
    assert {one["figure"] for one in results["human"]["agreement"]} == {"true_reward"}
    said = [line["text"] for line in results["verdict"]["lines"] if line["topic"] == "human"]
    assert said[0].startswith("people prefer dpo@v1 to sft@v1: sft@v1 has the win rate 0.00 [0.00, ")
    assert results["human"]["standings"][0]["bound"] == "at least"
