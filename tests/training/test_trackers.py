"""report_to: trackers get what metrics.jsonl gets, and never stop a run that trains."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking

from rlhf_pipeline.config import trackers as rules
from rlhf_pipeline.errors import ConfigError


class Recording:
    """A tracker that keeps what it is told; `fails` names the method that raises."""

    requires_logging_directory = False
    made: list[Any] = []  # noqa: RUF012
    fails = ""

    def __init__(self, *place: str, **options: Any):
        self.place, self.options, self.rows, self.config, self.ended = place, options, [], {}, False
        self.made.append(self)

    def _do(self, name: str) -> None:
        if self.fails == name:
            raise OSError(f"no network for {name}\nmore")

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self._do("log")
        print("synced")
        self.rows.append({"step": step, **values})

    def finish(self) -> None:
        self._do("finish")
        self.ended = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """Trackers that record, in place of those that accelerate has."""

    def use(*names: str, fails: str = "") -> type[Recording]:
        kind = type("Kind", (Recording,), {"made": [], "fails": fails})
        for name in names:
            monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setattr(rules, "is_installed", lambda name: name in names)
        wandb = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None))
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return kind

    return use


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_a_tracker_gets_the_rows_of_the_metrics_and_the_config(lab, recorded, stage) -> None:
    kind = recorded("trackio")
    evaluated = {} if stage == "ppo" else {"eval_steps": 2}
    result = lab.run(stage, report_to="trackio", **evaluated)
    (tracker,) = kind.made
    assert tracker.rows == lab.rows(result.run) and len(tracker.rows) >= 4
    assert tracker.ended and tracker.place == ("rlhf",) and tracker.options == {"name": Path(result.run).name}
    assert tracker.config["learning_rate"] == 1e-2 and tracker.config["split_fractions.train"] == 0.8
    assert all(isinstance(value, bool | int | float | str) for value in tracker.config.values())
    assert json.loads(tracker.config["report_to"]) == ["trackio"]


def test_several_trackers_and_wandb_without_an_account_is_offline(lab, recorded, monkeypatch) -> None:
    kind = recorded("trackio", "wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    result = lab.run("sft", report_to=["trackio", "wandb"], max_steps=2)
    first, second = kind.made
    assert first.rows == second.rows and second.place == ("mine",)
    run = Path(result.run).name
    assert second.options == {"name": run, "id": run, "resume": "allow", "dir": result.run, "mode": "offline"}


def test_a_tracker_that_does_not_start_stops_the_run_before_it_trains(lab, recorded) -> None:
    recorded("trackio", fails="start")
    with pytest.raises(ConfigError, match=r"report_to\.0: trackio does not start: .*no network for start"):
        lab.run("sft", report_to="trackio")
    assert not list((lab.home / "runs").glob("*"))


def test_what_a_tracker_prints_is_no_part_of_the_result(lab, recorded, capsys) -> None:
    recorded("trackio")
    lab.run("sft", report_to="trackio", max_steps=2)
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("synced") == 2


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_later_stops_nothing(lab, recorded, fails) -> None:
    recorded("trackio", fails=fails)
    result = lab.run("sft", report_to="trackio", max_steps=3)
    text = (Path(result.run) / "log.txt").read_text()
    assert text.count(f"report_to: trackio failed and is not used any more: no network for {fails}") == 1
    assert len(lab.rows(result.run)) == 3


def test_a_tracker_without_its_package_is_a_fault_of_the_config(lab, monkeypatch) -> None:
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report_to\.0: found 'mlflow'.*pip install mlflow, or remove it"):
        lab.config("dpo", report_to="mlflow")
    with pytest.raises(ConfigError, match=r"report_to.*did you mean 'tensorboard'"):
        lab.config("dpo", report_to="tensorbord")


@pytest.mark.parametrize("off", [None, "none", [], ["none"]])
def test_no_tracker(lab, off, monkeypatch) -> None:
    assert lab.config("dpo", report_to=off).report_to == ()
    monkeypatch.setattr(rules, "is_installed", lambda name: name in ("mlflow", "aim"))
    assert lab.config("dpo", report_to="all").report_to == ("mlflow", "aim")
    assert lab.config("dpo", report_to="aim, mlflow").report_to == ("aim", "mlflow")


def test_tensorboard_itself(lab) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = lab.run("sft", report_to="tensorboard", max_steps=3)
    (file,) = (Path(result.run) / "tensorboard").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    expected = [row["loss/nll"] for row in lab.rows(result.run)]
    assert [event.value for event in events.Scalars("loss/nll")] == pytest.approx(expected, rel=1e-6)
