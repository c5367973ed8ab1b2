"""A run that was stopped or killed and then resumed is bit-equal to one that was not, in every stage."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.errors import Interrupted
from rlhf_pipeline.training import session

STAGES = ("sft", "train-rm", "dpo", "ppo")
SETTINGS = {"max_steps": 6, "logging_steps": 1, "save_steps": 2, "weight_decay": 0.01, "warmup_steps": 2}
WITH_EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}


class Killed(Exception):
    """Stands for a process that ends without a word."""


def interrupt(monkeypatch, step, action):
    """Call `action` when update `step` ends, before anything is done about it."""
    fit = session.fit

    def wrapped(*args, on_update, **options):
        def hook(number, metrics, window):
            if number == step:
                action()
            on_update(number, metrics, window)

        return fit(*args, on_update=hook, **options)

    monkeypatch.setattr(session, "fit", wrapped)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    raise Killed


def settings(stage):
    return SETTINGS if stage == "ppo" else {**SETTINGS, **WITH_EVALUATION}


@pytest.fixture(scope="module", params=STAGES)
def whole(request, tiny, tmp_path_factory):
    """A run that nothing disturbed, in a home of its own."""
    lab = tiny.copy(tmp_path_factory.mktemp("whole") / "home")
    return request.param, lab, lab.run(request.param, **settings(request.param))


def assert_equal_runs(whole_lab, whole_result, lab, result):
    expected, found = whole_lab.weights(whole_result.model), lab.weights(result.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (Path(result.run) / "metrics.jsonl").read_text() == (Path(whole_result.run) / "metrics.jsonl").read_text()
    assert result.metrics == whole_result.metrics
    for name in ("flops", "tokens_trained", "tokens_generated", "optimizer_steps"):
        assert result.cost[name] == whole_result.cost[name]


@pytest.mark.parametrize("step", [1, 3, 6])
def test_stopped_by_a_signal(whole, lab, monkeypatch, step):
    stage, whole_lab, whole_result = whole
    with monkeypatch.context() as patch:
        interrupt(patch, step, terminate)
        with pytest.raises(Interrupted, match=f"step {step} of 6") as caught:
            lab.run(stage, **settings(stage))
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not lab.registry.models.numbers(Path(whole_result.path).parent.name)
    assert_equal_runs(whole_lab, whole_result, lab, lab.run(stage, **settings(stage)))


@pytest.mark.parametrize("step", [1, 4, 5])  # at 4 update 3 has been logged and is not in a checkpoint
def test_killed(whole, lab, monkeypatch, step):
    stage, whole_lab, whole_result = whole
    with monkeypatch.context() as patch:
        interrupt(patch, step, die)
        with pytest.raises(Killed):
            lab.run(stage, **settings(stage))
    assert_equal_runs(whole_lab, whole_result, lab, lab.run(stage, **settings(stage)))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole, lab, monkeypatch):
    stage, whole_lab, whole_result = whole
    with monkeypatch.context() as patch:
        interrupt(patch, 5, terminate)
        with pytest.raises(Interrupted):
            lab.run(stage, **settings(stage))
    (run,) = (lab.home / "runs").iterdir()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-4", "step-5"]
    with (run / "checkpoints" / "step-5" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xa5")
    assert_equal_runs(whole_lab, whole_result, lab, lab.run(stage, **settings(stage)))
    assert "step-5" in (run / "log.txt").read_text()


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
@pytest.mark.parametrize(("step", "action", "error"), [(3, terminate, Interrupted), (5, die, Killed)])
def test_the_bills_of_snapshots_survive(lab, monkeypatch, stage, step, action, error):
    options = {**SETTINGS, "snapshot_steps": [1, 3, 5, 6]}
    expected = lab.run(stage, **options, resume=False).cost["at_step"]
    with monkeypatch.context() as patch:
        interrupt(patch, step, action)
        with pytest.raises(error):
            lab.run(stage, **options)
    found = lab.run(stage, **options).cost
    assert list(found["at_step"]) == list(expected) == ["1", "3", "5", "6"]
    for at in expected:
        counts = ("flops", "tokens_trained", "tokens_generated", "optimizer_steps")
        assert [found["at_step"][at][name] for name in counts] == [expected[at][name] for name in counts]
    seconds = [found["at_step"][at]["wall_seconds"] for at in expected]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3] <= found["wall_seconds"]


def test_save_total_limit(whole):
    _, _, result = whole
    kept = sorted(path.name for path in (Path(result.run) / "checkpoints").iterdir())
    assert kept == ["step-2", "step-4"]  # the last update's weights are in the registry


def test_evaluation_by_epoch_is_not_repeated_after_a_resume(lab, monkeypatch):
    # 16 examples in windows of 4: epochs end at steps 4 and 8. The run stops in the second one.
    options = {
        "max_train_samples": 16,
        "per_device_train_batch_size": 4,
        "max_steps": None,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
    }
    with monkeypatch.context() as patch:
        interrupt(patch, 6, terminate)
        with pytest.raises(Interrupted):
            lab.run("sft", **options)
    rows = lab.rows(lab.run("sft", **options).run)
    assert [row["step"] for row in rows if "eval_nll" in row] == [4, 8]
    assert [row["step"] for row in rows if "loss/nll" in row] == list(range(1, 9))


def test_a_model_with_tied_weights_resumes(lab, monkeypatch):
    llama = {**lab.registry.resolve("sft").manifest.config["model_init"], "tie_word_embeddings": True}
    start = {"model_name_or_path": None, "model_init": llama, "tokenizer_init": {"type": "world"}}
    expected = lab.weights(lab.run("sft", output_name="whole", **start).model)
    assert "lm_head.weight" not in expected
    with monkeypatch.context() as patch:
        interrupt(patch, 2, terminate)
        with pytest.raises(Interrupted):
            lab.run("sft", output_name="stopped", **start)
    found = lab.weights(lab.run("sft", output_name="stopped", **start).model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_state_of_an_interrupted_run(lab, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2, terminate)
        with pytest.raises(Interrupted):
            lab.run("sft")
    (run,) = (lab.home / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    lab.run("sft")
    finished = json.loads((run / "run.json").read_text())
    assert (finished["status"], finished["model"]) == ("finished", "tuned@v1")


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_killed_between_registering_and_finishing_registers_nothing_twice(lab, monkeypatch, stage):
    from rlhf_pipeline.stages import publish

    with monkeypatch.context() as patch:
        patch.setattr(publish, "finish_run", lambda directory, model: die())
        with pytest.raises(Killed):
            lab.run(stage, **SETTINGS)
    result = lab.run(stage, **SETTINGS)
    name = result.model.partition("@")[0]
    assert result.model == f"{name}@v1"
    assert lab.registry.models.numbers(name) == [1]
    assert lab.run(stage, **SETTINGS).model == f"{name}@v2"  # a finished run starts a new version


def test_a_run_whose_folder_was_removed_is_not_taken_for_the_registered_one(lab):
    import shutil

    first = lab.run("sft", max_steps=1)
    shutil.rmtree(first.run)
    second = lab.run("sft", max_steps=1)
    assert (second.run, second.model) == (first.run, "tuned@v2")


def test_a_run_of_two_processes_keeps_the_size_of_its_steps_in_one(lab, monkeypatch):
    """A checkpoint of 2 processes with 4 examples each, resumed in one: as a run of one with 8."""
    whole = lab.run("sft", output_name="whole", per_device_train_batch_size=8)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, terminate)
        with pytest.raises(Interrupted):
            lab.run("sft", per_device_train_batch_size=8)
    (state,) = (lab.home / "runs").glob("tuned-*/checkpoints/step-2/state.json")
    changed = json.loads(state.read_text())
    assert changed["extra"]["inputs"]["processes"] == "1"
    changed["extra"]["inputs"]["processes"] = "2"
    state.write_text(json.dumps(changed))
    from rlhf_pipeline.config.dump import config_digest
    from rlhf_pipeline.registry.digests import file_entry

    manifest = state.with_name("manifest.json")
    files = json.loads(manifest.read_text())["files"]
    manifest.write_text(json.dumps({"files": {**files, "state.json": file_entry(state).model_dump()}}))
    half = lab.config("sft", per_device_train_batch_size=4)
    state.parents[2].rename(state.parents[3] / f"tuned-{config_digest(half)[:10]}")
    resumed = lab.run("sft", per_device_train_batch_size=4)
    assert "resumed at step 2 of 4; it began in 2 processes" in (Path(resumed.run) / "log.txt").read_text()
    found, expected = lab.weights("tuned"), lab.weights("whole")
    assert all((found[name] - expected[name]).abs().max() <= 1e-5 for name in expected)
    assert lab.rows(resumed.run)[-1]["loss/nll"] == pytest.approx(lab.rows(whole.run)[-1]["loss/nll"], abs=1e-5)


def test_two_processes_do_not_train_one_run(lab):
    import fcntl

    from rlhf_pipeline.errors import BadInput

    config = lab.config("sft", max_steps=1)
    from rlhf_pipeline.config.dump import config_digest

    directory = lab.home / "runs" / f"tuned-{config_digest(config)[:10]}"
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({"status": "running", "pid": 4711}))
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match=r"being trained by process 4711.*--no-resume"):
            lab.run("sft", max_steps=1)
        assert lab.run("sft", max_steps=1, resume=False).run == f"{directory}-2"
    assert lab.run("sft", max_steps=1).run == str(directory)


def test_an_unfinished_run_of_another_config_is_named_with_the_keys_that_differ(lab, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 3, terminate)
        with pytest.raises(Interrupted):
            lab.run("sft", **SETTINGS, learning_rate=1e-5)
    result = lab.run("sft", **SETTINGS, learning_rate=0.5)
    line = next(line for line in (Path(result.run) / "log.txt").read_text().splitlines() if "unfinished" in line)
    assert "learning_rate 1e-05 there, 0.5 here" in line and "max_steps" not in line


def test_dropout_goes_on_where_it_was(lab, monkeypatch):
    """The masks of dropout come from torch's own generator, which a checkpoint holds."""
    model = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.5}
    changes = {"model_name_or_path": None, "model_init": model, "tokenizer_init": {"type": "world"}, "dropout": True}
    changes |= {**SETTINGS, "dataset_name": "world:verdicts", "max_train_samples": 200}
    expected = lab.run("sft", **changes, resume=False)
    off = {"dropout": False, "model_init": {key: model[key] for key in model if key != "resid_pdrop"}}
    without = lab.run("sft", **{**changes, **off}, output_name="without")
    with monkeypatch.context() as patch:
        interrupt(patch, 3, terminate)
        with pytest.raises(Interrupted):
            lab.run("sft", **changes)
    result = lab.run("sft", **changes)
    assert result.model != expected.model
    assert_equal_runs(lab, expected, lab, result)
    weights, dry = lab.weights(result.model), lab.weights(without.model)
    assert any(not torch.equal(weights[name], dry[name]) for name in dry)


@pytest.mark.parametrize("place", ["loading", "tokenising"])
def test_no_handler_of_errors_swallows_a_signal_before_an_update(lab, pairs, monkeypatch, place):
    """Loading a model turns every error into one of ours, and tokenising tries a failed batch text by text."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

    of = {"loading": (AutoModelForCausalLM, "from_pretrained"), "tokenising": (PreTrainedTokenizerBase, "__call__")}
    owner, name = of[place]
    whole, calls = getattr(owner, name), []

    def signalled(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            terminate()
        return whole(*args, **options)

    data = {"dataset_name": pairs(), "dataset_train_split": "all", "dataset_test_split": "all"}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Interrupted, match="signal 15 before an update") as caught:
            lab.run("dpo", **data, max_steps=2)
    assert caught.value.exit_code == 143 and len(calls) == 1
    assert lab.run("dpo", **data, max_steps=2).cost["optimizer_steps"] == 2


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_an_update_ends_the_run_at_once(whole, lab, monkeypatch, begun, number):
    stage, whole_lab, whole_result = whole
    if begun:
        with monkeypatch.context() as patch:
            interrupt(patch, 3, terminate)
            with pytest.raises(Interrupted):
                lab.run(stage, **settings(stage))
    with monkeypatch.context() as patch:
        make = session.optimizer_of
        patch.setattr(session, "optimizer_of", lambda *a, **o: (os.kill(os.getpid(), number), make(*a, **o))[1])
        interrupt(patch, 4 if begun else 1, lambda: pytest.fail("an update was made"))
        with pytest.raises(Interrupted, match=f"signal {int(number)} before an update") as caught:
            lab.run(stage, **settings(stage))
    assert caught.value.exit_code == 128 + number
    assert_equal_runs(whole_lab, whole_result, lab, lab.run(stage, **settings(stage)))


def test_a_signal_after_the_last_update_lets_the_model_be_registered(whole, lab, monkeypatch):
    stage, whole_lab, whole_result = whole
    fit = session.fit
    with monkeypatch.context() as patch:

        def ended(*args, **options):
            fit(*args, **options)
            session.tell_all = lambda *a: (terminate(), tell_all(*a))

        tell_all = session.tell_all
        patch.setattr(session, "tell_all", tell_all)  # put back at the end
        patch.setattr(session, "fit", ended)
        result = lab.run(stage, **settings(stage))
    assert result.stopped_by == signal.SIGTERM and "stopped_by" not in result.as_dict()
    assert "registering the model" in (Path(result.run) / "log.txt").read_text()
    assert_equal_runs(whole_lab, whole_result, lab, result)


@pytest.mark.parametrize("phase", ["training", "ending"])
def test_a_signal_within_another_output_is_noted_all_the_same(phase: str) -> None:
    from rlhf_pipeline.training.open_run import _signals

    def refused(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    log, config = SimpleNamespace(say=refused), SimpleNamespace(engine="native")
    run = SimpleNamespace(stopped_by=None, phase=phase, log=log, config=config)
    with _signals(run):
        signal.raise_signal(signal.SIGTERM)
    assert run.stopped_by == signal.SIGTERM
