"""How a window is cut, packed or padded changes no gradient and no weight, in any stage."""

from __future__ import annotations

import functools

import pytest
import torch

from rlhf_pipeline.data import batch as batches
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.tree_attention import TreeMask
from rlhf_pipeline.training import ppo_rollouts, session, windows

STAGES = ("sft", "train-rm", "dpo", "ppo", "train-rm on rankings", "dpo on rankings", "plackett-luce")

# A large epsilon keeps AdamW's step proportional to small gradients, so that weights show gradients as they are.
SETTINGS = {"adam_epsilon": 1e-1, "max_steps": 3, "learning_rate": 1e-1, "max_grad_norm": 0}


@pytest.fixture(scope="module")
def run(rankings):
    """Run a stage of STAGES in a laboratory."""
    untied = {"dataset_name": rankings(), "dataset_train_split": "all", "dataset_test_split": "all"}
    tied = {**untied, "dataset_name": rankings(ties=True)}
    variants = {
        "train-rm on rankings": ("train-rm", {**tied, "center_rewards_coefficient": 0.1}),
        "dpo on rankings": ("dpo", tied),
        "plackett-luce": ("dpo", {**untied, "loss_type": "plackett_luce"}),
    }

    def start(lab, name: str, **changes):
        stage, own = variants.get(name, (name, {}))
        return lab.run(stage, **own, **changes)

    return start


def options(stage: str, size: int) -> dict:
    if stage == "ppo":  # the number of micro-batches follows from the minibatch of 8
        return {"per_device_train_batch_size": size, **SETTINGS}
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, **SETTINGS}


def assert_same(found: dict, expected: dict, start: dict | None = None) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    if start is not None:
        shared = [name for name in start if name in expected and start[name].shape == expected[name].shape]
        assert max(float((start[name] - expected[name]).abs().max()) for name in shared) > 1e-3


@pytest.fixture(scope="module", params=STAGES)
def plain(request, tiny, run, tmp_path_factory):
    """A stage run with one micro-batch of 8 per step."""
    lab = tiny.copy(tmp_path_factory.mktemp("plain") / "home")
    result = run(lab, request.param, output_name="plain", **options(request.param, 8))
    return request.param, lab, result


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches(plain, run, size):
    stage, lab, reference = plain
    result = run(lab, stage, output_name=f"cut{size}", **options(stage, size))
    assert_same(lab.weights(result.model), lab.weights(reference.model), lab.weights("sft"))
    for found, expected in zip(lab.rows(result.run), lab.rows(reference.run), strict=True):
        for name in ("grad_norm", "loss/nll", "loss/bradley_terry", "loss/dpo", "loss/policy_avg", "loss/value_avg"):
            assert found.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), abs=2e-6, rel=1e-5)


def test_plain_rows_instead_of_trees(plain, run, monkeypatch):
    stage, lab, reference = plain
    rows = Reader("rows", "linear")
    monkeypatch.setattr("rlhf_pipeline.stages.common.inspect_model", lambda model: rows)
    monkeypatch.setattr("rlhf_pipeline.models.selfcheck.inspect_reward_model", lambda model: rows)
    result = run(lab, stage, output_name="rows", **options(stage, 8))
    assert_same(lab.weights(result.model), lab.weights(reference.model))


def test_flat_batches_instead_of_trees(plain, run, monkeypatch):
    stage, lab, reference = plain
    made = []
    original = TreeMask.of
    monkeypatch.setattr(TreeMask, "of", lambda *given: made.append(given) or original(*given))
    monkeypatch.setitem(batches.pack.__kwdefaults__, "flat_from", 0)  # these trees are short
    result = run(lab, stage, output_name="flat", **options(stage, 8))
    assert made
    assert_same(lab.weights(result.model), lab.weights(reference.model))


def test_micro_batches_by_tokens(plain, run, monkeypatch):
    stage, lab, reference = plain
    held, original = [], batches.pack

    def watched(examples, *given, **more):
        batch = original(examples, *given, **more)
        held.append((batch.active_tokens, batch.num_completions if stage == "ppo" else len(examples)))
        return batch

    monkeypatch.setattr(windows, "pack", watched)
    monkeypatch.setattr(ppo_rollouts, "pack", watched)
    result = run(lab, stage, output_name="tokens", micro_batch_tokens=30, **options(stage, 8))
    assert all(tokens <= 30 or count == 1 for tokens, count in held)
    assert max(count for _, count in held) < 8 and len(held) > 3
    assert_same(lab.weights(result.model), lab.weights(reference.model))


def test_gradient_checkpointing(plain, run, monkeypatch):
    stage, lab, reference = plain
    told = []
    original = session.checkpoint_activations
    monkeypatch.setattr(session, "checkpoint_activations", lambda model: told.append(original(model)))
    result = run(lab, stage, output_name="again", gradient_checkpointing=True, **options(stage, 8))
    assert told == [None]
    assert_same(lab.weights(result.model), lab.weights(reference.model))


def test_padding(plain, run, monkeypatch):
    stage, lab, reference = plain
    padded = functools.partial(batches.pack, row_length=45)
    monkeypatch.setattr(windows, "pack", padded)
    monkeypatch.setattr(ppo_rollouts, "pack", padded)
    result = run(lab, stage, output_name="padded", **options(stage, 8))
    assert_same(lab.weights(result.model), lab.weights(reference.model))
    if stage != "ppo":
        assert lab.rows(result.run)[0]["grad_norm"] == pytest.approx(lab.rows(reference.run)[0]["grad_norm"], rel=1e-5)


def test_padding_and_cutting_change_no_bill(plain, run):
    stage, lab, reference = plain
    result = run(lab, stage, output_name="bill", **options(stage, 2))
    for name in ("tokens_generated", "optimizer_steps"):
        assert result.cost[name] == reference.cost[name]
    for name in ("flops", "tokens_trained"):
        if stage == "ppo":  # responses to one prompt share it where they stand in one micro-batch
            assert reference.cost[name] <= result.cost[name] <= 1.5 * reference.cost[name]
        else:
            assert result.cost[name] == reference.cost[name]
