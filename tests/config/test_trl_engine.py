"""What `engine: trl` refuses before anything is loaded."""

from __future__ import annotations

import pytest

REFUSED = [
    ("sft", {"save_steps": 5}, "save_steps", "writes no checkpoints"),
    ("train-rm", {"snapshot_steps": 5}, "snapshot_steps", "takes no snapshots"),
    ("dpo", {"snapshot_steps": [1, 2]}, "snapshot_steps", "takes no snapshots"),
    ("sft", {"micro_batch_tokens": 512}, "micro_batch_tokens", "only by the number of examples"),
    ("train-rm", {"score_pooling": "mean"}, "score_pooling", "the score at the last token"),
    ("dpo", {"loss_type": "ipo"}, "loss_type", "averages them over each response's tokens"),
    ("dpo", {"loss_type": "plackett_luce"}, "loss_type", "accepts only pairs"),
    ("dpo", {"loss_type": "simpo"}, "loss_type", "DPOTrainer does not have"),
    ("dpo", {"loss_type": "orpo"}, "loss_type", "DPOTrainer does not have"),
    ("dpo", {"label_smoothing": 0.1}, "label_smoothing", "ignores silently"),
    ("dpo", {"soft_labels": True}, "soft_labels", "only on hard labels"),
    ("dpo", {"use_margin": True}, "use_margin", "DPOTrainer reads no margin"),
    ("dpo", {"dataset_name": "world:verdicts", "max_steps": 3}, "dataset_name", "fresh pairs at every step"),
    ("ppo", {}, "engine", "TRL 1.16 has no PPO trainer"),
    ("ppo", {"save_steps": 5}, "engine", "TRL 1.16 has no PPO trainer"),
]


@pytest.mark.parametrize(("stage", "changes", "key", "found"), REFUSED)
def test_what_trl_cannot_do_is_refused_by_name(faults, load, stage, changes, key, found):
    refused = faults(stage, engine="trl", **changes)
    assert list(refused) == [key]
    assert found in refused[key].found
    assert load(stage, **changes).engine == "native"


def test_a_loss_that_must_be_stopped_early_is_refused(faults):
    refused = faults("dpo", engine="trl", loss_type="apo_down")
    assert list(refused) == ["loss_type"] and "must be stopped early" in refused["loss_type"].found


def test_the_way_out_is_named(faults):
    assert (
        faults("dpo", engine="trl", loss_type="ipo")["loss_type"].expected
        == "sigmoid, robust, hinge, ipo_mean, sigmoid_norm or apo_zero"
    )
    assert faults("sft", engine="trl", save_steps=5)["save_steps"].fix == "or engine: native"
    assert faults("ppo", engine="trl")["engine"].fix == "engine: trl works for sft, train-rm and dpo"


def test_another_engine_is_unknown(faults):
    assert faults("sft", engine="accelerate")["engine"].expected == "one of native, trl"


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {"completion_only_loss": False, "dropout": True, "eval_steps": 3}),
        ("train-rm", {"center_rewards_coefficient": 0.01, "bf16": True}),
        ("dpo", {"loss_type": "ipo_mean", "precompute_ref_log_probs": False, "ref_model": "sft"}),
        ("dpo", {"loss_type": ["sigmoid"]}),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.2}),
        ("dpo", {"sft_weight": 0.2}),
        ("dpo", {"f_divergence": "alpha", "f_alpha": 0.3}),
        ("dpo", {"ld_alpha": 0.3}),
        ("dpo", {"sync_ref_model": True}),
        ("dpo", {"loss_type": ["sigmoid", "apo_zero", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ],
)
def test_what_it_can_do(load, stage, changes):
    assert load(stage, engine="trl", **changes).engine == "trl"


def test_faults_of_an_engine_come_with_those_of_other_keys(faults):
    refused = faults("dpo", engine="trl", loss_type="ipo", save_steps=2, beta=-1)
    assert set(refused) == {"loss_type", "save_steps", "beta"}
