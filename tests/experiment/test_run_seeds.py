"""Several seeds and a sweep: every run once, stopped and gone on with, handed over to the comparison."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import expand
from rlhf_pipeline.errors import ConfigError, Interrupted
from rlhf_pipeline.experiment.estimate import estimate_experiment
from rlhf_pipeline.experiment.run import checked, run_experiment

CPU = {"use_cpu": True, "num_threads": 1, "max_prompt_length": 6, "response_length": 4}
TRAINING = {**CPU, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_steps": 2}
CONTENT = {
    "name": "trial",
    "seeds": [0, 1],
    "stages": {
        "chosen": {
            **CPU,
            "stage": "collect",
            "policy": "sft",
            "prompts": "world:verdicts",
            "judge": "world",
            "num": 60,
        },
        "start": {**TRAINING, "stage": "sft", "model_name_or_path": "sft", "dataset_name": "collected:pairs"},
        "scorer": {
            **TRAINING,
            "stage": "train-rm",
            "model_name_or_path": "start",
            "dataset_name": "chosen",
            "reward_centering_samples": 16,
        },
        "ppo": {
            **TRAINING,
            "stage": "ppo",
            "model_name_or_path": "start",
            "reward_model_path": "scorer",
            "dataset_name": "chosen",
            "rollout_batch_size": 8,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
        },
        "dpo": {**TRAINING, "stage": "dpo", "model_name_or_path": "start", "dataset_name": "chosen"},
    },
    "compare": {"arms": ["ppo", "dpo"], "baseline": "start", "use_cpu": True, "num_threads": 1},
    "sweep": {"ppo.kl_coef": [0.1, 0.5], "dpo.beta": [0.1, 0.5]},
}
# chosen and start once; for each seed the reward model, and each arm at two settings
RUNS = ["chosen", "start"]
for _seed in (0, 1):
    RUNS += [f"scorer seed {_seed}"]
    RUNS += [f"{arm} beta={beta} seed {_seed}" for arm in ("ppo", "dpo") for beta in (0.1, 0.5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return file


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the comparison is called with, in place of comparing."""
    calls: list[dict] = []

    def run_compare(config, home, **options):
        calls.append({"config": config, **options})
        report = home / "reports" / config.name
        report.mkdir(parents=True, exist_ok=True)
        (report / "results.json").write_text("{}")
        return {"rows": []}

    stand_in = ModuleType("rlhf_pipeline.compare.run")
    stand_in.run_compare = run_compare
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return calls


def run(lab, path: Path, *overrides: str):
    return run_experiment(path, overrides, lab.home, quiet=True)


def names_of(result) -> list[str]:
    return [label(entry) for entry in result["points"]]


def label(entry) -> str:
    """The run that a line of the result is about; chosen and start belong to no seed."""
    words = [entry["stage_name"], *(f"{key}={value}" for key, value in entry["setting"].items())]
    return " ".join(words if entry["stage_name"] in ("chosen", "start") else [*words, f"seed {entry['seed']}"])


def made(lab) -> Counter:
    """How many versions each stage of the experiment has."""
    names = Counter(item.name for item in [*lab.registry.models.all(), *lab.registry.data.all()])
    return Counter({name: names[name] for name in CONTENT["stages"] if names[name]})


ALL = Counter(chosen=1, start=1, scorer=2, ppo=4, dpo=4)


@pytest.mark.check
def test_stopped_and_gone_on_with_every_run_is_made_once(lab, path, handed_over, monkeypatch, capsys):
    from rlhf_pipeline.stages import dpo

    train, seen = dpo.train, []

    def stop_in_the_second(run, model, plan):
        seen.append(run.config.beta)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(run, model, plan)

    # 1. A signal in the seventh run, dpo at .5 of seed 0: a checkpoint, and nothing of seed 1.
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "train", stop_in_the_second)
        with pytest.raises(Interrupted) as stopped:
            run_experiment(path, [], lab.home)
    assert stopped.value.exit_code == 143 and seen == [0.1, 0.5]
    assert made(lab) == Counter(chosen=1, start=1, scorer=1, ppo=2, dpo=1)
    told = capsys.readouterr().err
    assert "seeds 0, 1: each runs scorer, ppo, dpo again; run once: chosen, start" in told
    assert "[1/12] chosen (ran 0, skipped 0)\n" in told
    assert re.search(r"\[7/12\] dpo beta=0.5 seed 0 \(ran 6, skipped 0; about \d+ s left\)\n", told)
    assert "stopped in dpo beta=0.5 seed 0: 6 of 12 are done" in told

    # 2. The dry run knows what is done, and what is not.
    dry = estimate_experiment(path, [], lab.home)
    assert (dry["runs"], dry["done"], dry["to_run"]) == (12, 6, 6)
    assert list(dry["stages"]) == RUNS
    assert dry["stages"]["ppo beta=0.5 seed 0"] == "ppo: already done, ppo@v2"
    assert dry["stages"]["dpo beta=0.5 seed 0"] == "dpo: to run"

    # 3. A failure in the tenth run; then all of it.
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_pipeline.stages.ppo.train", fail_at(0.5))
        with pytest.raises(ZeroDivisionError):
            run(lab, path)
    assert made(lab) == Counter(chosen=1, start=1, scorer=2, ppo=3, dpo=2)
    assert not handed_over
    result = run(lab, path)
    assert made(lab) == ALL
    assert names_of(result) == RUNS
    assert [entry["skipped"] for entry in result["points"]] == [True] * 9 + [False] * 3
    assert all(entry["seconds"] > 0 for entry in result["points"])
    assert result["resampled"] == ["scorer", "ppo", "dpo"]
    assert {name: entry["model"] for name, entry in result["stages"].items()} == {
        name: f"{name}@v1" for name in CONTENT["stages"]
    }
    # The interrupted run went on from its checkpoint: one run directory, not two.
    assert len(list((lab.home / "runs").glob("dpo-*"))) == 4

    # 4. Each model is what its line says.
    for entry in result["points"]:
        if entry["stage_name"] in ("ppo", "dpo"):
            manifest = lab.registry.resolve(entry["model"]).manifest
            key = "kl_coef" if entry["stage_name"] == "ppo" else "beta"
            assert (manifest.seed, manifest.config[key]) == (entry["seed"], entry["setting"]["beta"])
            assert manifest.parents["base"].ref == "start@v1"
            if entry["stage_name"] == "ppo":
                assert manifest.parents["reward_model"].ref == f"scorer@v{entry['seed'] + 1}"

    # 5. The comparison gets the first node of each stage in its config, and all points of the arms beside it.
    (call,) = handed_over
    assert (call["config"].arms, call["config"].baseline) == (("ppo@v1", "dpo@v1"), "start@v1")
    assert call["points"] == tuple(
        Point(arm, seed, {"beta": beta}, f"{arm}@v{2 * seed + 1 + number}")
        for arm in ("ppo", "dpo")
        for seed in (0, 1)
        for number, beta in enumerate((0.1, 0.5))
    )
    assert call["resampled"] == ("scorer", "ppo", "dpo")

    # 6. Nothing is left to do.
    again = run(lab, path)
    assert all(entry["skipped"] for entry in again["points"]) and made(lab) == ALL
    assert [entry["model"] for entry in again["points"]] == [entry["model"] for entry in result["points"]]


def fail_at(kl_coef: float):
    """A `train` that fails at a setting."""
    from rlhf_pipeline.stages.ppo import train

    def failing(run, model, plan):
        return 1 / 0 if run.config.kl_coef == kl_coef else train(run, model, plan)

    return failing


def test_more_seeds_and_settings_run_only_what_is_new(lab, path, handed_over):
    small = ("ppo.kl_coef=.5", "ppo.max_steps=1", "dpo.max_steps=1")
    run(lab, path, *small, "seeds=[0]", "sweep.dpo.beta=[.1]")
    assert made(lab) == Counter(chosen=1, start=1, scorer=1, ppo=1, dpo=1)
    result = run(lab, path, *small, "seeds=[0, 3]", "sweep.dpo.beta=[.1, .7]", "seed_resamples=[dpo]")
    new = [label(entry) for entry in result["points"] if not entry["skipped"]]
    assert new == ["dpo beta=0.7 seed 0", "dpo beta=0.1 seed 3", "dpo beta=0.7 seed 3"]
    # An arm that no seed draws anew is one point, with the seed that made it.
    assert [p for p in handed_over[-1]["points"] if p.arm == "ppo"] == [Point("ppo", 0, {}, "ppo@v1")]
    assert handed_over[-1]["resampled"] == ("dpo",)
    settings = {(point.arm, *point.setting.items()) for point in handed_over[-1]["points"]}
    assert settings == {("ppo",), ("dpo", ("beta", 0.1)), ("dpo", ("beta", 0.7))}


def test_one_seed_without_a_sweep_has_the_result_it_always_had(lab, path, handed_over):
    overrides = ("seeds=[0]", "sweep={}", "compare.arms=[dpo, reward-free]", "compare.baseline=start")
    lab.run("dpo", output_name="reward-free", seed=8, max_steps=1)
    result = run(lab, path, *overrides)
    assert set(result) == {"experiment", "stages", "comparison"}
    assert all(set(entry) == {"stage", "model", "skipped"} for entry in result["stages"].values())
    # An arm from outside the experiment is a point with its own seed.
    (call,) = handed_over
    assert call["points"] == (Point("dpo", 0, {}, "dpo@v1"), Point("reward-free", 8, {}, "reward-free@v1"))
    assert call["resampled"] == ()


def test_with_snapshots_each_model_comes_after_those_of_its_run(lab, path, handed_over):
    lab.run("dpo", output_name="outside", seed=8, max_steps=2, snapshot_steps=1)
    arms = "compare.arms=[dpo, outside, 'outside@v1#1']"
    shown = ("seeds=[0]", "sweep={}", arms, "compare.baseline=start", "dpo.snapshot_steps=1", "dpo.max_steps=3")
    run(lab, path, *shown, "compare.snapshots=true")
    dpo = [Point("dpo", 0, {}, f"dpo@v1#{step}", step) for step in (1, 2)]
    outside = [Point("outside", 8, {}, "outside@v1#1", 1), Point("outside", 8, {}, "outside@v1")]
    named = Point("outside@v1#1", 8, {}, "outside@v1#1")
    assert handed_over[-1]["points"] == (*dpo, Point("dpo", 0, {}, "dpo@v1"), *outside, named)
    run(lab, path, *shown)
    assert handed_over[-1]["points"] == (Point("dpo", 0, {}, "dpo@v1"), outside[1], named)


def test_the_command_line(lab, tmp_path, capsys):
    stage = {**TRAINING, "stage": "dpo", "model_name_or_path": "sft", "dataset_name": "collected:pairs", "max_steps": 1}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({"name": "small", "seeds": [0, 1], "stages": {"dpo": stage}}))
    words = ["run", str(file), "dpo.beta=.5", "sweep.dpo.beta=[1, 2]", "--home", str(lab.home)]
    assert main([*words, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert re.search(r"to_run +2 ", dry) and re.search(r"dpo seed 1 +dpo: to run ", dry)
    assert main(words) == 0
    told = capsys.readouterr()
    assert "note: override dpo.beta=.5: replaces the sweep of dpo.beta" in told.err
    rows = [line.split() for line in told.out.splitlines() if "@v" in line]
    assert rows == [["dpo", "-", str(seed), f"dpo@v{seed + 1}", "done"] for seed in (0, 1)]
    assert main([*words[:2], "sweep.dpo.beta=[.5, 1]", *words[4:], "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(p["seed"], p["setting"], p["model"], p["skipped"]) for p in points] == [
        (0, {"beta": 0.5}, "dpo@v1", True),
        (0, {"beta": 1.0}, "dpo@v3", False),
        (1, {"beta": 0.5}, "dpo@v2", True),
        (1, {"beta": 1.0}, "dpo@v4", False),
    ]


def test_swept_references_are_checked_before_anything_runs(lab, path):
    swept = "sweep.ppo.reward_model_path=[scorer, reward, sft]"
    experiment = load_experiment(path, ["sweep={}", swept], known_models=lab.registry.models.names())
    with pytest.raises(ConfigError, match=r"ppo\.reward_model_path: sft@v1") as caught:
        checked(experiment, expand(experiment), lab.registry)
    assert len(caught.value.faults) == 1
