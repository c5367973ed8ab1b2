"""Keys of optimizers, schedules, the best model, and trackers: what is accepted, and what is refused by name."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from rlhf_pipeline.config import optim as rules
from rlhf_pipeline.config.optim import OPTIMIZERS, SCHEDULES, OptimName, ScheduleName


def test_the_names_are_those_of_transformers() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    theirs = {name.value for name in OptimizerNames}
    assert set(get_args(OptimName)) - theirs == {"lion", "muon"}
    refused = {name for name in theirs - OPTIMIZERS.keys() if name.startswith(tuple(rules._NOT_OFFERED))}
    assert theirs <= OPTIMIZERS.keys() | refused
    assert set(get_args(ScheduleName)) == {name.value for name in SchedulerType}


def test_the_arguments_of_schedules_are_those_of_transformers() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
    for name, schedule in SCHEDULES.items():
        theirs = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters) - common
        if not schedule.measures:
            assert schedule.args == theirs, name


def test_the_arguments_of_optimizers_are_theirs() -> None:
    import torch
    from transformers.optimization import Adafactor

    owners = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
    for name, kind in {**owners, "muon": torch.optim.Muon, "adafactor": Adafactor}.items():
        assert OPTIMIZERS[name].args <= set(inspect.signature(kind).parameters), name


@pytest.mark.parametrize("name", ["galore_adamw", "lomo", "schedule_free_adamw", "adamw_torch_8bit", "apollo_adamw"])
def test_an_optimizer_that_is_not_offered_says_why(faults, name) -> None:
    (fault,) = faults("dpo", optim=name).values()
    assert fault.fix.startswith(f"{name} is not available: ") and "adafactor" in fault.expected


def test_a_misspelt_optimizer_and_schedule(faults) -> None:
    assert faults("dpo", optim="adafator")["optim"].fix.startswith("did you mean 'adafactor'")
    assert "did you mean 'cosine'" in faults("dpo", lr_scheduler_type="cosin")["lr_scheduler_type"].fix


def test_a_missing_package_is_named(faults, monkeypatch) -> None:
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    for stage in ("sft", "train-rm", "dpo", "ppo"):
        fault = faults(stage, optim="adamw_8bit")["optim"]
        assert "there is no package bitsandbytes" in fault.found and "pip install bitsandbytes" in fault.fix


@pytest.mark.parametrize("given", ["momentum=0.9,nesterov=true", '{"momentum": 0.9, "nesterov": true}'])
def test_arguments_as_text(load, given) -> None:
    assert load("dpo", optim="sgd", optim_args=given).optim_args == {"momentum": 0.9, "nesterov": True}
    assert load("dpo", optim_args=None).optim_args == {}


def test_arguments_that_an_optimizer_or_a_schedule_does_not_take(faults) -> None:
    found = faults("dpo", optim="sgd", optim_args={"momentun": 0.9}, lr_scheduler_kwargs={"min_lr": 1e-6})
    assert found["optim_args.momentun"].fix == "did you mean 'momentum'?"
    assert found["lr_scheduler_kwargs.min_lr"].expected == "no arguments"
    for name in ("cosine_with_min_lr", "warmup_stable_decay"):
        assert "needs" in faults("dpo", lr_scheduler_type=name)["lr_scheduler_kwargs"].found


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_measures_needs_evaluations_and_has_no_warm_up(faults, load, name) -> None:
    assert "eval_strategy is no" in faults("dpo", lr_scheduler_type=name)["lr_scheduler_type"].found
    assert "warmup_steps" in faults("dpo", lr_scheduler_type=name, eval_steps=5, warmup_steps=3)
    assert load("dpo", lr_scheduler_type=name, eval_steps=5).lr_scheduler_type == name


@pytest.mark.parametrize(
    ("key", "value"), [("load_best_model_at_end", True), ("early_stopping_patience", 3), ("save_strategy", "best")]
)
def test_the_best_model_needs_evaluations_of_the_native_engine(faults, load, key, value) -> None:
    assert "eval_strategy is no" in faults("sft", **{key: value})[key].found
    assert "engine trl" in faults("sft", engine="trl", eval_steps=2, **{key: value})[key].found
    assert "snapshot_steps" in faults("ppo", **{key: value})[key].fix
    assert load("sft", eval_steps=2, **{key: value}).follows_metric


@pytest.mark.parametrize(
    ("stage", "given", "metric", "greatest"),
    [
        ("sft", None, "eval_nll", False),
        ("dpo", "loss", "eval_nll", False),
        ("dpo", "eval_rewards/accuracies", "eval_accuracy", True),
        ("train-rm", "accuracy", "eval_accuracy", True),
        ("train-rm", "eval_brier", "eval_brier", False),
    ],
)
def test_the_metric_and_its_direction(load, stage, given, metric, greatest) -> None:
    config = load(stage, eval_steps=2, load_best_model_at_end=True, metric_for_best_model=given)
    assert (config.best_metric, config.best_is_greatest) == (metric, greatest)
    assert load(stage, metric_for_best_model=given, greater_is_better=not greatest).best_is_greatest is not greatest


def test_a_metric_that_is_not_measured(faults) -> None:
    fault = faults("train-rm", metric_for_best_model="acuracy", eval_steps=2)["metric_for_best_model"]
    assert fault.fix.startswith("did you mean 'accuracy'") and "eval_nll" in fault.expected
    assert "early_stopping_patience" in faults("sft", early_stopping_threshold=0.1)["early_stopping_threshold"].found
