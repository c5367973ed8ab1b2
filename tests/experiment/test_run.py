"""Experiments: what is done is skipped, what depends on a change is run again, faults come first."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlhf_pipeline.errors import BadInput, ConfigError, Interrupted
from rlhf_pipeline.experiment import done
from rlhf_pipeline.experiment import run as runner
from rlhf_pipeline.experiment.run import run_experiment
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report import load

SHARED = {
    "max_prompt_length": 6,
    "response_length": 4,
    "use_cpu": True,
    "num_threads": 1,
}
TRAINING = {**SHARED, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_steps": 2}
CONFIGS = {
    "start": {**TRAINING, "model_name_or_path": "sft", "dataset_name": "collected:pairs"},
    "chosen": {**SHARED, "prompts": "world:verdicts", "judge": "world", "num": 60, "policy": "start"},
    "scorer": {**TRAINING, "reward_centering_samples": 16},
    "ppo": {**TRAINING, "rollout_batch_size": 8, "num_ppo_epochs": 1, "num_mini_batches": 1, "kl_coef": 0.5},
    "dpo": {**TRAINING, "beta": 0.5},
    "compare": {"use_cpu": True, "num_threads": 1, "samples": 2, "max_new_tokens": 2},  # few responses in all
}
STAGES = {
    "start": {"stage": "sft"},
    "chosen": {"stage": "collect", "policy": "start"},
    "scorer": {"stage": "train-rm", "model_name_or_path": "start", "dataset_name": "chosen"},
    "ppo": {
        "stage": "ppo",
        "model_name_or_path": "start",
        "reward_model_path": "scorer",
        "dataset_name": "chosen",
    },
    "dpo": {"stage": "dpo", "model_name_or_path": "start", "dataset_name": "chosen"},
}


@pytest.fixture
def experiment(lab, tmp_path):
    """Write an experiment of five stages; changes are {stage: {key: value}}."""
    folder = tmp_path / "experiment"
    folder.mkdir()

    def write(compare: bool | dict = True, **changes):
        changes["compare"] = compare if isinstance(compare, dict) else {}
        for name, values in CONFIGS.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({**values, **changes.get(name, {})}))
        stages = {name: {**entry, "config": f"{name}.yaml"} for name, entry in STAGES.items()}
        content = {"name": "trial", "seeds": [0], "stages": stages}
        if compare is not False:
            content["compare"] = {"arms": ["ppo", "dpo"], "baseline": "start", "config": "compare.yaml"}
        path = folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def run(lab, path, *overrides):
    return run_experiment(path, overrides, lab.home, quiet=True)


def skipped(result):
    return {name for name, stage in result["stages"].items() if stage["skipped"]}


def test_the_second_time_everything_is_skipped(lab, experiment, undrawn):
    path = experiment()
    first = run(lab, path)
    assert skipped(first) == set()
    assert {name: stage["model"] for name, stage in first["stages"].items()} == {name: f"{name}@v1" for name in STAGES}
    manifest = lab.registry.resolve("ppo").manifest
    assert manifest.parents["reward_model"].ref == "scorer@v1"
    assert manifest.config["dataset_name"] == "collected:chosen@v1"
    second = run(lab, path)
    assert skipped(second) == set(STAGES)
    assert second["comparison"].rows == first["comparison"].rows
    assert lab.registry.models.names() == ["dpo", "ppo", "reward", "scorer", "sft", "start"]
    assert load(lab.home / "reports" / "trial" / "results.json") == second["comparison"]


@pytest.mark.check
@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("dpo.beta=0.3", {"dpo"}),
        ("scorer.learning_rate=0.02", {"scorer", "ppo"}),
        ("chosen.num=61", {"chosen", "scorer", "ppo", "dpo"}),
        ("start.max_steps=3", set(STAGES)),
        ("compare.samples=3", set()),
    ],
)
def test_an_override_runs_again_what_depends_on_it(lab, experiment, undrawn, override, again):
    path = experiment(compare=override.startswith("compare"))
    run(lab, path)
    result = run(lab, path, override)
    assert set(STAGES) - skipped(result) == again
    # And back: the first versions are still there.
    assert skipped(run(lab, path)) == set(STAGES)


def test_other_data_of_the_same_name_run_again_what_was_trained_on_them(lab, experiment):
    path = experiment(compare=False)
    run(lab, path)
    lab.run("collect", output_name="pairs", num=90)  # a second version of what `start` is trained on
    result = run(lab, path)
    assert "start" not in skipped(result)
    assert result["stages"]["start"]["model"] == "start@v2"


def killed(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.check
def test_a_run_that_was_killed_after_it_registered_its_model_is_ended(lab, experiment, tmp_path):
    path = experiment(compare=False)
    run(lab, path, f"dpo.output_dir={tmp_path / 'copy'}")
    (directory,) = (lab.home / "runs").glob("dpo-*")
    ended = json.loads((directory / "run.json").read_text())
    assert (ended["status"], ended["model"]) == ("finished", "dpo@v1")
    # As a SIGKILL leaves it while run.json is replaced.
    (directory / "run.json").write_text(json.dumps({"status": "running", "pid": 1, "token": ended["token"]}))
    (directory / ".run.json-0123456789ab.tmp").write_text(json.dumps(ended))
    shutil.rmtree(tmp_path / "copy")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed again before the copy
        patch.setattr(Registry, "export", killed)
        run(lab, path, f"dpo.output_dir={tmp_path / 'copy'}")
    assert skipped(run(lab, path, f"dpo.output_dir={tmp_path / 'copy'}")) == set(STAGES)
    assert json.loads((directory / "run.json").read_text()) == ended
    assert not list(directory.glob(".*.tmp")) and (tmp_path / "copy" / "model.safetensors").is_file()
    # A run of another token goes on as it is.
    other = {"status": "running", "pid": 1, "token": "another"}
    (directory / "run.json").write_text(json.dumps(other))
    run(lab, path, f"dpo.output_dir={tmp_path / 'copy'}")
    assert json.loads((directory / "run.json").read_text()) == other


@pytest.mark.check
def test_a_run_that_was_killed_before_its_copy_was_made_is_ended(lab, tmp_path):
    settings = {"output_dir": str(tmp_path / "copy"), "max_steps": 1}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, "export", killed)
        lab.run("dpo", **settings)
    assert lab.run("dpo", **settings).model == "dpo@v1"
    assert (tmp_path / "copy" / "model.safetensors").is_file()
    assert lab.run("dpo", **settings).model == "dpo@v2"


def test_a_stage_that_failed_is_taken_up_again(lab, experiment, monkeypatch):
    from rlhf_pipeline.stages import dpo

    path = experiment(compare=False)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(lab, path)
    result = run(lab, path)
    assert skipped(result) == set(STAGES) - {"dpo"}
    (directory,) = (lab.home / "runs").glob("dpo-*")
    assert json.loads((directory / "run.json").read_text())["model"] == "dpo@v1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": {"dataset_name": "collected:nowhere"}}, "nowhere"),
        ({"start": {"dataset_name": "missing.jsonl"}}, "missing.jsonl"),
        ({"chosen": {"judge": "nobody"}}, "nobody"),
        ({"chosen": {"judge": "sft"}}, "sft@v1"),
        ({"start": {"model_name_or_path": "reward"}}, "reward@v1"),
    ],
)
def test_what_is_missing_is_found_before_the_first_stage(lab, experiment, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(lab, experiment(**changes))
    assert lab.registry.models.names() == ["reward", "sft"]
    assert not any((lab.home / "runs").glob("*"))


def test_all_faults_come_at_once(lab, experiment):
    path = experiment(start={"dataset_name": "collected:nowhere"}, chosen={"judge": "sft"})
    with pytest.raises(ConfigError) as caught:
        run(lab, path)
    text = str(caught.value)
    assert "start.dataset_name" in text and "chosen.judge" in text


def test_seeds_of_the_experiment_are_those_of_its_stages(lab, experiment):
    run(lab, experiment(compare=False), "seeds=[5]")
    assert lab.registry.resolve("dpo").manifest.seed == 5


def test_a_signal_when_a_stage_is_done_stops_before_the_next(lab, experiment, monkeypatch):
    path, of = experiment(compare=False), runner.stage_function
    with monkeypatch.context() as patch:
        patch.setattr(runner, "stage_function", lambda name: lambda *a, **o: replace(of(name)(*a, **o), stopped_by=15))
        with pytest.raises(Interrupted, match="signal 15 after start was done: 1 of 5 are done") as caught:
            run(lab, path)
    assert caught.value.exit_code == 143
    assert lab.registry.models.names() == ["reward", "sft", "start"]
    assert skipped(run(lab, path)) == {"start"}


@pytest.fixture
def counts(monkeypatch):
    """How often files are parsed and hashed, and models loaded, by their name; files count as settled at once."""
    from rlhf_pipeline.data import sources
    from rlhf_pipeline.disk import stamps
    from rlhf_pipeline.models import loading
    from rlhf_pipeline.registry import digests, integrity

    found: dict[str, Counter[str]] = {"parsed": Counter(), "hashed": Counter(), "loaded": Counter()}
    monkeypatch.setattr(stamps, "SETTLED", 0)

    def count(kind, function, place):
        def call(*args, **options):
            path = Path(args[place])
            found[kind]["/".join(path.parts[-3:] if path.suffix else path.parts[-2:])] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(sources, "rows_in", count("parsed", sources.rows_in, 0))
    monkeypatch.setattr(loading, "_load", count("loaded", loading._load, 1))
    reading = count("hashed", digests.file_sha256, 0)
    for module in (digests, integrity):
        monkeypatch.setattr(module, "file_sha256", reading)
    return found


@pytest.mark.check
def test_the_same_work_is_done_once(lab, experiment, counts):
    run(lab, experiment())
    assert counts["parsed"] == {"pairs/v1/records.jsonl": 1, "chosen/v1/records.jsonl": 1}
    # Made from `sft`; a policy of collect, the trunk of the reward model and its centering, PPO's actor and reference,
    # DPO's policy and reference, and once for all parts of the comparison. PPO's reward model, and the comparison's.
    assert counts["loaded"] == {"sft/v1": 1, "start/v1": 8, "scorer/v1": 2, "ppo/v1": 1, "dpo/v1": 1}
    # A file is read once when it is registered, in a folder of another name, and once before it is loaded.
    weights = {name: count for name, count in counts["hashed"].items() if name.endswith("/v1/model.safetensors")}
    assert weights == {f"{name}/v1/model.safetensors": 1 for name in ("sft", "start", "scorer", "ppo", "dpo")}


@pytest.mark.check
def test_a_comparison_that_is_there_is_not_made_again(lab, experiment, counts, monkeypatch):
    """Nothing is loaded; what it was made of, or what lies there, being another, it is made again."""
    path, report = experiment(compare={"exact": False}), lab.home / "reports" / "trial"
    monkeypatch.setattr("rlhf_pipeline.report.write_report", lambda _, folder: (folder / "index.html").write_text("x"))
    first, written = run(lab, path), (report / "results.json").read_text()

    def again(*overrides: str) -> bool:
        counts["loaded"].clear()
        result = run(lab, path, *overrides)
        assert result["comparison"] == load(report / "results.json")
        return bool(counts["loaded"])

    assert not again()
    assert run(lab, path)["comparison"] == first["comparison"]
    assert again("compare.samples=3")
    assert again() and (report / "results.json").read_text() == written
    (report / "results.json").write_text(written.replace('"name"', '"Name"', 1))
    assert again()
    (report / "index.html").unlink()
    assert again()
    (report / "inputs.json").write_text("{")
    assert again()
    monkeypatch.setattr(done, "source_digest", lambda: "of another version of this package")
    assert again() and not again()


@pytest.mark.check
def test_prompts_that_have_changed_are_compared_on_again(lab, experiment, tmp_path, counts):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the pacing of this horror was"}\n')
    path = experiment(compare={"prompts": str(prompts), "split": "all", "validation_split": None, "exact": False})
    for text in ("the pacing of this horror was", "the pacing of this comedy was"):
        prompts.write_text(json.dumps({"prompt": text}) + "\n")
        assert run(lab, path)["comparison"].prompt_texts == [text]
    counts["loaded"].clear()
    run(lab, path)
    assert not counts["loaded"]


@pytest.mark.check
def test_what_a_function_scores_is_compared_each_time(lab, experiment, tmp_path, counts, monkeypatch):
    (tmp_path / "truth_of_this_test.py").write_text(
        "def truth(prompts, completions, **_):\n    return [1.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = experiment(compare={"true_reward": "truth_of_this_test:truth", "exact": False})
    run(lab, path)
    counts["loaded"].clear()
    run(lab, path)
    assert counts["loaded"]


def test_several_processes_train_and_one_collects(lab, experiment, monkeypatch):
    """A stand-in for the launcher, which `test_launch.py` tests: it runs the stage here and keeps what it was given."""
    given = []

    def launched(stage, config, home, *, count, **options):
        given.append((stage, count))
        return runner.stage_function(stage)(config, home, **options)

    monkeypatch.setattr(runner, "run_in_processes", launched)
    path = experiment(compare=False)
    result = run_experiment(path, (), lab.home, quiet=True, processes=2)
    assert given == [("sft", 2), ("train-rm", 2), ("ppo", 2), ("dpo", 2)]
    assert not skipped(result)
    assert skipped(run_experiment(path, (), lab.home, quiet=True, processes=2)) == set(STAGES)


@pytest.mark.parametrize(("given", "found"), [({"jobs": 2}, "--jobs 2"), ({"executor": "ray"}, "--executor ray")])
def test_several_runs_at_a_time_have_one_process_each(lab, experiment, given, found):
    with pytest.raises(BadInput, match=f"found {found} with --num-processes 2, expected one of them"):
        run_experiment(experiment(compare=False), (), lab.home, quiet=True, processes=2, **given)


def test_an_experiment_is_not_started_by_a_launcher(lab, experiment, monkeypatch):
    """Each process would run all of it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=r"found a launcher of 2 processes .* use rlhf run FILE --num-processes 2"):
        run_experiment(experiment(), ["no_such_key=1"], lab.home)
