"""What a run is made of: other inputs than its checkpoint's are refused, and every model reads one vocabulary."""

from __future__ import annotations

import json
import shutil

import pytest

from rlhf_pipeline.compare.rows import bill
from rlhf_pipeline.errors import BadInput, Interrupted, MismatchError

PROMPTS = ("the plot of this drama was", "the music of this western was", "the acting of this comedy was")


def write_pairs(path, chosen: str, rejected: str) -> None:
    pair = {"chosen": f" {chosen}", "rejected": f" {rejected}"}
    rows = [{"prompt": prompt, **pair} for prompt in PROMPTS for _ in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def interrupted(lab, monkeypatch, **changes) -> None:
    """A DPO run that a signal stops after its first update."""
    from rlhf_pipeline.training.tracking import RunLog

    original = RunLog.update

    def stop(self, step, metrics, note=""):
        original(self, step, metrics)
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "update", stop)
        with pytest.raises(Interrupted):
            lab.run("dpo", **changes)


def test_a_resumed_run_refuses_other_data(lab, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    everything = {"dataset_name": str(data), "dataset_train_split": "all"}
    write_pairs(data, "great", "dull")
    interrupted(lab, monkeypatch, **everything)
    write_pairs(data, "dull", "great")
    with pytest.raises(MismatchError, match=r"started with other inputs: data .*--no-resume"):
        lab.run("dpo", **everything)
    assert lab.run("dpo", resume=False, **everything).model == "dpo@v1"


def test_a_resumed_run_refuses_another_parent(lab, monkeypatch):
    interrupted(lab, monkeypatch)
    lab.run("sft", output_name="sft", model_name_or_path="sft", dataset_name="world:verdicts", max_steps=1)
    with pytest.raises(MismatchError, match=r"base .*reference"):
        lab.run("dpo")


def test_a_reference_with_another_tokenizer_is_refused(lab, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(lab.home / "models/sft/v1", other)
    (other / "manifest.json").unlink()
    text = (other / "tokenizer.json").read_text().replace('"great"', '"grand"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(MismatchError, match=r"other: found tokenizer .*the policy sft@v1"):
        lab.run("dpo", ref_model=str(other))


def test_every_reward_model_is_on_the_bill(lab):
    lab.run("train-rm", output_name="second", max_steps=3, seed=1)
    terms = ["reward", {"source": "second", "weight": 0.5}]
    lab.run("ppo", reward_model_path=None, reward_functions=terms, value_init="sft", max_steps=1)
    arm = lab.registry.resolve("ppo")
    steps = [lab.registry.resolve(name).manifest.cost["optimizer_steps"] for name in ("ppo", "reward", "second")]
    assert set(arm.manifest.parents) == {"base", "reference", "reward_model", "reward_model_2"}
    spent = bill(lab.registry, arm)
    assert spent is not None and spent.optimizer_steps == sum(steps)


def test_a_model_that_cannot_be_decoded_in_batches_is_not_sampled_from(lab):
    state_space = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    lab.run(
        "sft",
        output_name="mamba",
        model_name_or_path=None,
        model_init=state_space,
        tokenizer_init={"type": "world"},
        dataset_name="world:verdicts",
        max_train_samples=20,
        max_steps=1,
    )
    with pytest.raises(BadInput, match="so sampling is impossible"):
        lab.run("collect", policy="mamba")
