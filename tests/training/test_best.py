"""The best evaluation: which one it is, when a run stops, whose weights are registered, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_pipeline.errors import ConfigError, Interrupted
from rlhf_pipeline.training.best import Best
from tests.conftest import sigterm_at, word_rankings

EVALUATED = {"eval_steps": 1, "max_steps": 6, "learning_rate": 0.3}


def best_of(lab, tmp_path, **changes) -> Best:
    config = lab.config("train-rm", eval_steps=1, **changes)
    return Best(config, tmp_path, writes=True)


@pytest.mark.parametrize(
    ("changes", "values", "best", "stops"),
    [
        # patience 2: 3 and 4 are misses in a row after 2
        ({"early_stopping_patience": 2}, [3.0, 1.0, 2.0, 1.5], (2, 1.0), [False, False, False, True]),
        # equal is not better; a better one resets the count
        ({"early_stopping_patience": 2}, [1.0, 1.0, 0.5, 0.5], (3, 0.5), [False, False, False, False]),
        # better by less than the threshold: the best weights, but a miss
        (
            {"early_stopping_patience": 2, "early_stopping_threshold": 0.5},
            [3.0, 2.9, 2.8],
            (3, 2.8),
            [False, False, True],
        ),
        (
            {"metric_for_best_model": "accuracy", "early_stopping_patience": 1},
            [0.5, 0.7, 0.6],
            (2, 0.7),
            [False, False, True],
        ),
        ({"early_stopping_patience": 1, "greater_is_better": True}, [0.5, 0.7, 0.6], (2, 0.7), [False, False, True]),
        # NaN is never the best
        ({"early_stopping_patience": 3}, [float("nan"), 2.0, float("nan"), 1.0], (4, 1.0), [False] * 4),
    ],
)
def test_which_evaluation_is_the_best_and_when_a_run_stops(lab, tmp_path, changes, values, best, stops) -> None:
    followed = best_of(lab, tmp_path, **changes)
    model = nn.Linear(1, 1)
    found = [followed.consider(step, value, model) for step, value in enumerate(values, 1)]
    assert found == stops and (followed.step, followed.value) == best
    assert not (tmp_path / "best").exists()


def test_weights_are_kept_until_no_checkpoint_needs_them(lab, tmp_path) -> None:
    followed, model = best_of(lab, tmp_path, load_best_model_at_end=True), nn.Linear(2, 2)

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / "best").iterdir())

    followed.consider(1, 3.0, model)
    wanted = model.weight.detach().clone()
    followed.saved()  # a checkpoint at step 1
    with torch.no_grad():
        model.weight.add_(1)
    followed.consider(2, 2.0, model)
    assert kept() == ["step-1", "step-2"]  # a run that is killed now continues from the checkpoint
    resumed = best_of(lab, tmp_path, load_best_model_at_end=True)
    resumed.restore({"value": 3.0, "step": 1, "misses": 0})
    other = nn.Linear(2, 2)
    resumed.load(other)
    assert torch.equal(other.weight, wanted)
    followed.consider(3, 1.0, model)
    assert kept() == ["step-1", "step-3"]
    followed.saved()
    assert kept() == ["step-3"]


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo"])
def test_the_registered_weights_are_those_of_the_best_evaluation(lab, stage) -> None:
    """At a learning rate that is too large an early evaluation is the best one, and snapshots show its weights."""
    result = lab.run(stage, **EVALUATED, load_best_model_at_end=True, snapshot_steps=1)
    evaluations = {row["step"]: row["eval_nll"] for row in lab.rows(result.run) if "eval_nll" in row}
    step = min(evaluations, key=lambda number: evaluations[number])
    assert result.metrics["best"] == {
        "metric": "eval_nll",
        "value": evaluations[step],
        "step": step,
        "ended_early": False,
    }
    assert step < 6
    name = "score.weight" if stage == "train-rm" else "model.norm.weight"
    snapshot = lab.registry.resolve(f"{result.model}#{step}").path
    from safetensors.torch import load_file

    assert torch.equal(lab.weights(result.model)[name], load_file(snapshot / "model.safetensors")[name])
    measured = result.metrics["nll" if stage == "train-rm" else "eval_nll"]
    assert measured == pytest.approx(evaluations[step], rel=1e-6)


def test_a_run_stops_early_and_says_so(lab) -> None:
    options = {"early_stopping_patience": 2, "save_strategy": "best", "save_total_limit": 30}
    result = lab.run("sft", **{**EVALUATED, "max_steps": 30}, **options)
    values = {row["step"]: row["eval_nll"] for row in lab.rows(result.run) if "eval_nll" in row}
    steps = list(values)
    saved = sorted(int(path.name.removeprefix("step-")) for path in (Path(result.run) / "checkpoints").iterdir())
    assert saved == [step for step in steps if values[step] == min(values[n] for n in steps if n <= step)]
    best = result.metrics["best"]
    assert best["ended_early"] and steps[-1] == best["step"] + 2 < 30
    assert result.cost["optimizer_steps"] == steps[-1]
    assert "stopped early: 2 evaluations in a row" in (Path(result.run) / "log.txt").read_text()


def test_a_run_that_is_stopped_at_its_last_step_is_not_trained_further(lab, tmp_path) -> None:
    options = {**EVALUATED, "max_steps": 30, "early_stopping_patience": 2}
    other = lab.copy(tmp_path / "other")
    expected = other.run("sft", **options)
    with sigterm_at(expected.cost["optimizer_steps"]), pytest.raises(Interrupted):
        lab.run("sft", **options)
    found = lab.run("sft", **options)
    assert found.cost["optimizer_steps"] == expected.cost["optimizer_steps"] < 30
    assert found.metrics == expected.metrics and found.metrics["best"]["ended_early"]


@pytest.mark.parametrize("extra", [{"save_steps": 2}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_a_resumed_run_ends_with_the_same_best_weights(lab, tmp_path, monkeypatch, extra) -> None:
    options = {**EVALUATED, "load_best_model_at_end": True, "early_stopping_patience": 3, **extra}
    other = lab.copy(tmp_path / "other")
    expected = other.run("sft", **options)
    with sigterm_at(3), pytest.raises(Interrupted):
        lab.run("sft", **options)
    found = lab.run("sft", **options)
    assert found.metrics == expected.metrics
    weights = other.weights(expected.model)
    assert all(torch.equal(value, weights[name]) for name, value in lab.weights(found.model).items())
    assert (Path(found.run) / "metrics.jsonl").read_text() == (Path(expected.run) / "metrics.jsonl").read_text()


def test_a_plateau_lowers_the_rate_after_a_worse_evaluation(lab) -> None:
    kwargs = {"factor": 0.5, "patience": 0}
    options = {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": kwargs}
    rows = lab.rows(lab.run("sft", **options).run)
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    nll = {row["step"]: row["eval_nll"] for row in rows if "eval_nll" in row}
    rate, best = 0.3, float("inf")
    for step in range(1, 7):
        assert rates[step] == rate
        # patience 0: an evaluation that is not better by one part in 10,000 halves the rate
        rate, best = (rate, nll[step]) if nll[step] < best * (1 - 1e-4) else (rate / 2, best)
    assert rates[6] < 0.3


def test_a_run_without_held_out_examples_is_refused_before_it_trains(lab, tmp_path) -> None:
    rows = word_rankings(8, ties=False)
    lines = [{"prompt": row["prompt"], "completion": row["completions"][0], "ended": False} for row in rows]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({**line, "split": "train"}) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=r"load_best_model_at_end: there are no held-out examples"):
        lab.run("sft", dataset_name=str(data), eval_steps=1, load_best_model_at_end=True)
