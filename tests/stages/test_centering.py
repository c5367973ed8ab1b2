"""Responses that a reward model's scores are centred on: told, estimated, interruptible, sampled once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.errors import Interrupted
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.stages import reward
from rlhf_pipeline.training import session
from tests.conftest import sigterm_at


def said(result_or_run) -> str:
    return (Path(result_or_run) / "log.txt").read_text()


def test_sampling_is_told_before_it_begins_and_before_training(lab) -> None:
    log = said(lab.run("train-rm", max_steps=1).run)
    line = "reward_centering: sampling 64 responses of at most 4 tokens from sft@v1"
    assert log.index(line) < log.index("reward_centering: ") + len(line)
    assert " of 64 responses ended; mean length " in log and log.index(line) < log.index("held-out accuracy")
    assert "sampling" not in said(lab.run("train-rm", max_steps=1, reward_centering="chosen", output_name="other").run)


def test_the_estimate_has_its_place(lab, capsys) -> None:
    config = lab.config("train-rm", reward_centering_samples=512, response_length=4)
    assert estimate_stage(config, lab.home)["reward_centering"] == {"responses": 512, "tokens_at_most": 2048}
    assert "reward_centering" not in estimate_stage(lab.config("train-rm", reward_centering="none"), lab.home)
    words = ["train-rm", "model_name_or_path=sft", "dataset_name=collected:pairs", "output_name=x", "use_cpu=true"]
    assert main(["--home", str(lab.home), *words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reward_centering"]["responses"] == 512


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_sampling_ends_the_run_at_once(lab, monkeypatch, number) -> None:
    def deaf(*args, **options):
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not heard")

    with monkeypatch.context() as patch:
        patch.setattr(reward, "sample_for_prompts", deaf)
        with pytest.raises(Interrupted, match="before an update") as caught:
            lab.run("train-rm")
    assert caught.value.exit_code == 128 + number
    assert not lab.registry.models.numbers("scored")


def test_a_resumed_run_does_not_sample_again(lab, tmp_path, monkeypatch) -> None:
    options = {"max_steps": 4, "save_steps": 2}
    expected = lab.copy(tmp_path / "other").run("train-rm", **options)
    with sigterm_at(3), pytest.raises(Interrupted):
        lab.run("train-rm", **options)
    with monkeypatch.context() as patch:
        patch.setattr(reward, "sample_for_prompts", lambda *a, **o: pytest.fail("sampled twice"))
        found = lab.run("train-rm", **options)
    assert found.metrics == expected.metrics and found.metrics["reward_shift"] != 0
    for name in ("flops", "tokens_generated", "tokens_trained"):
        assert found.cost[name] == expected.cost[name]


def test_a_damaged_file_of_responses_is_sampled_again(lab, monkeypatch) -> None:
    options = {"max_steps": 4, "save_steps": 2}
    fit = session.fit

    def killed(*args, on_update, **more):
        def hook(step, metrics, window):
            on_update(step, metrics, window)
            if step == 3:
                raise KeyError("stands for a killed process")

        return fit(*args, on_update=hook, **more)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", killed)
        with pytest.raises(KeyError):
            lab.run("train-rm", **options)
    (run,) = (lab.home / "runs").iterdir()
    (run / reward.CENTERING).write_text("[[")
    result = lab.run("train-rm", **options)
    assert said(result.run).count("reward_centering: sampling") == 2
