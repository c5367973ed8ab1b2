"""What a run says at its start about a config that is right, and does otherwise than one may think."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import ConfigError

LENGTHS = ["max_prompt_length=6", "response_length=4"]
PPO = ["model_name_or_path=sft", "reward_model_path=reward", "dataset_name=collected:pairs", "output_name=ppo"]


def log_of(run: str) -> str:
    return (Path(run) / "log.txt").read_text()


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (
            ["total_episodes=100"],
            "total_episodes 100 is not a multiple of rollout_batch_size 64: 1 update of 64 episodes",
        ),
        (
            ["total_episodes=50", "rollout_batch_size=16", "num_mini_batches=2"],
            "total_episodes 50 is not a multiple of rollout_batch_size 16: 3 updates of 16 episodes",
        ),
        (["total_episodes=128"], None),
        (["total_episodes=100", "max_steps=2"], None),
    ],
)
def test_episodes_that_no_rollout_takes(given: list[str], note: str | None) -> None:
    assert load_config("ppo", None, [*PPO, *given]).notes == ((note,) if note else ())


def test_episodes_are_noted_in_a_dry_run_and_at_the_start(capsys, lab) -> None:
    note = "note: total_episodes 20 is not a multiple of rollout_batch_size 16: 1 update of 16 episodes"
    words = ["ppo", *PPO, *LENGTHS, "total_episodes=20", "rollout_batch_size=16", "num_mini_batches=2", "use_cpu=true"]
    words += ["num_ppo_epochs=1", "--home", str(lab.home)]
    assert main([*words, "--dry-run"]) == 0
    assert note in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert note in log_of(json.loads(capsys.readouterr().out)["run"])


def test_the_dry_run_of_an_experiment_has_its_notes(capsys, lab, tmp_path: Path) -> None:
    (tmp_path / "ppo.yaml").write_text("\n".join(word.replace("=", ": ", 1) for word in PPO[:3]))
    text = "name: x\nstages:\n  ppo: {stage: ppo, config: ppo.yaml, total_episodes: 200}\n"
    (tmp_path / "experiment.yaml").write_text(text)
    assert main(["run", str(tmp_path / "experiment.yaml"), "--home", str(lab.home), "--dry-run"]) == 0
    note = "note: total_episodes 200 is not a multiple of rollout_batch_size 64: 3 updates of 64 episodes"
    assert capsys.readouterr().out.count(note) == 1


def test_a_finished_run_and_the_version_that_it_has_made(lab) -> None:
    first = lab.run("sft", max_steps=1)
    assert "has finished" not in log_of(first.run)
    second = lab.run("sft", max_steps=1)
    name = Path(first.run).name
    assert f"note: run {name} of this config has finished as tuned@v1: this run creates a new version" in log_of(
        second.run
    )
    third = lab.run("sft", max_steps=1)
    assert f"run {name}-2 of this config has finished as tuned@v2" in log_of(third.run) and third.model == "tuned@v3"
    assert "has finished" not in log_of(lab.run("sft", max_steps=1, seed=1).run)
    for version in ("v3", "v4"):
        lab.registry.remove(f"tuned@{version}")
    # The newest one that is still there.
    assert f"run {name}-2 of this config has finished as tuned@v2" in log_of(lab.run("sft", max_steps=1).run)


@pytest.mark.parametrize(("settings", "why"), [({}, " (save_steps is off)"), ({"save_steps": 50}, "")])
def test_an_unfinished_run_without_a_checkpoint(lab, settings: dict[str, int], why: str) -> None:
    result = lab.run("sft", max_steps=1, **settings)
    said = f"nothing to resume: no checkpoint{why}; run {Path(result.run).name} starts again from the beginning"
    assert "nothing to resume" not in log_of(result.run)
    status = Path(result.run) / "run.json"  # as a process that was killed leaves it
    status.write_text(json.dumps({"status": "running", "token": "other"}))
    again = lab.run("sft", max_steps=1, **settings)
    assert again.run == result.run and said in log_of(again.run)


def test_a_reference_that_training_does_not_start_from(lab) -> None:
    other, child = lab.run("sft", max_steps=1), lab.run("sft", max_steps=1, seed=1, output_name="child")
    said = "note: ref_model tuned@v1 is neither child@v1, the start of training, nor one of its ancestors"
    assert said in log_of(lab.run("dpo", model_name_or_path="child", ref_model=other.model, max_steps=1).run)
    for number, reference in enumerate(("child@v1", "sft", "sft@v1")):
        result = lab.run("dpo", model_name_or_path="child", ref_model=reference, max_steps=1, seed=number)
        assert "is neither" not in log_of(result.run)
    # Its own files in another folder are the same model.
    shutil.copytree(lab.registry.resolve(child.model).path, lab.home.parent / "copy")
    result = lab.run("dpo", model_name_or_path="child", ref_model=str(lab.home.parent / "copy"), max_steps=1)
    assert "is neither" not in log_of(result.run)


def test_lengths_that_contradict_name_where_each_was_given(tmp_path: Path) -> None:
    path = tmp_path / "dpo.yaml"
    path.write_text("model_name_or_path: sft\ndataset_name: d\noutput_name: x\nmax_prompt_length: 6\nmax_length: 10\n")
    with pytest.raises(ConfigError) as refused:
        load_config("dpo", path, ["response_length=200"])
    assert str(refused.value) == (
        "override response_length=200: max_prompt_length 6 + response_length 200 is not max_length 10 (given: "
        f"{path}:4: max_prompt_length, {path}:5: max_length, override response_length=200); expected max_length 206; "
        "give two of the three lengths; they determine the third"
    )


def test_lengths_that_were_not_given_are_not_complained_of(lab) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("ppo", None, [*PPO, "total_episodes=64", "response_length=2000"])
    assert str(refused.value).startswith(
        "override response_length=2000: the default max_length 1024 leaves -976 tokens"
    )
    with pytest.raises(ConfigError) as refused:
        lab.run("dpo", max_prompt_length=None, response_length=20)
    assert str(refused.value) == (
        "response_length: prompt and response of up to 1024 tokens (max_prompt_length 1004, which follows; "
        "response_length 20; max_length 1024, the default); expected at most 32, the positions of sft@v1; set "
        "max_prompt_length and response_length, or max_length"
    )


def test_keys_of_a_model_from_scratch_are_checked_before_anything_is_made(capsys, tmp_path: Path) -> None:
    init = "{model_type: llama, hiden_size: 16}"
    values = f"output_name: x\ntokenizer_init: byte_level_bpe\ndataset_name: world:verdicts\nmodel_init: {init}\n"
    (tmp_path / "sft.yaml").write_text(values.replace("byte_level_bpe", "{type: byte_level_bpe, vocab_size: 300}"))
    (tmp_path / "experiment.yaml").write_text("name: x\nstages:\n  base: {stage: sft, config: sft.yaml}\n")
    home = ["--home", str(tmp_path / "home")]
    for words in (["sft", "--config", str(tmp_path / "sft.yaml")], ["run", str(tmp_path / "experiment.yaml")]):
        assert main([*words, *home]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "hiden_size" in error and "did you mean" in error, error
    assert not (tmp_path / "home").exists()
