"""DPO's losses in its config."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.kto import UNPAIRED


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "plackett_luce", *UNPAIRED])
def test_a_loss_may_stand_in_a_list_of_one_as_trl_writes_it(load, name):
    assert load("dpo", loss_type=name).loss_type == load("dpo", loss_type=[name]).loss_type == name


@pytest.mark.parametrize("value", ["hinge", "robust", "bco_pair", "Sigmoid", ["sigmoid", "ipo"]])
def test_a_loss_that_is_not_there_is_refused_with_those_that_are(faults, value):
    refused = faults("dpo", loss_type=value)
    assert list(refused) == ["loss_type"]
    assert repr(value) in refused["loss_type"].found
    known = "sigmoid, ipo, ipo_mean, sigmoid_norm, apo_zero, plackett_luce, kto, apo_zero_unpaired"
    assert refused["loss_type"].expected == f"one of {known}"


@pytest.mark.parametrize("name", ["ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "plackett_luce"])
def test_smoothing_belongs_to_the_sigmoid_loss(load, faults, name):
    assert load("dpo", label_smoothing=0.1).label_smoothing == 0.1
    assert load("dpo", label_smoothing=0, loss_type=name).loss_type == name
    refused = faults("dpo", label_smoothing=0.1, loss_type=name)
    assert refused["label_smoothing"].found == f"label_smoothing 0.1 with loss_type {name}"
    assert "loss_type sigmoid" in refused["label_smoothing"].expected


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"loss_type": "ipo"}, "loss_type ipo, which defines no margin"),
        ({"soft_labels": True}, "soft_labels: a margin belongs to a label that is certain"),
        ({"label_smoothing": 0.1}, "label_smoothing: a margin belongs to a label that is certain"),
        ({"dataset_name": "world:verdicts", "max_steps": 3}, "fresh pairs have no margin"),
    ],
)
def test_margins_belong_to_recorded_labels_and_the_sigmoid_loss(load, faults, changes, found):
    assert load("dpo", use_margin=True).use_margin
    refused = faults("dpo", use_margin=True, **changes)
    assert list(refused) == ["use_margin"] and found in refused["use_margin"].found


def test_rankings_have_no_label_probabilities(faults):
    refused = faults("dpo", loss_type="plackett_luce", soft_labels=True)
    assert list(refused) == ["soft_labels"] and "loss_type sigmoid" in refused["soft_labels"].expected
    refused = faults("dpo", loss_type="plackett_luce", dataset_name="world:verdicts", max_steps=3)
    assert list(refused) == ["loss_type"] and "'sigmoid'" in refused["loss_type"].expected
    assert "world:verdicts draws pairs" in refused["loss_type"].found


@pytest.mark.parametrize("value", [-0.1, 0.5, 1.0])
def test_smoothing_is_a_rate_of_flips_below_one_half(faults, value):
    assert "label_smoothing" in faults("dpo", label_smoothing=value)


def test_every_loss_of_the_config_is_in_the_table_and_the_reverse():
    from typing import get_args

    from rlhf_pipeline.algorithms.preference import OBJECTIVES

    assert set(get_args(DpoConfig.model_fields["loss_type"].annotation)) == {*OBJECTIVES, *UNPAIRED}


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"desirable_weight": 2.0}, "desirable_weight", "found 2.0 with loss_type sigmoid, which does not read it"),
        ({"undesirable_weight": 2.0, "loss_type": "ipo"}, "undesirable_weight", "with loss_type ipo"),
        ({"kto_kl": "sampled", "loss_type": "apo_zero_unpaired"}, "kto_kl", "with loss_type apo_zero_unpaired"),
        ({"loss_type": "kto", "soft_labels": True}, "soft_labels", "whose labels are good or bad"),
        ({"loss_type": "kto", "label_smoothing": 0.1}, "label_smoothing", "with loss_type kto"),
        ({"loss_type": "kto", "use_margin": True}, "use_margin", "loss_type kto, which defines no margin"),
        ({"loss_type": "kto", "engine": "trl"}, "loss_type", "engine trl runs only TRL's DPOTrainer"),
        ({"loss_type": "kto", "dataset_name": "world:verdicts", "max_steps": 3}, "loss_type", "label probabilities"),
        ({"loss_type": "kto", "per_device_train_batch_size": 1}, "per_device_train_batch_size", "a step of one"),
        ({"loss_type": "kto", "kto_kl": "sampled", "fsdp": True}, "kto_kl", "only a whole policy can sample"),
    ],
)
def test_kto_and_the_keys_of_others(faults, changes, key, found):
    refused = faults("dpo", **changes)
    assert list(refused) == [key] and found in refused[key].found


def test_a_window_of_one_response_is_enough_where_z0_is_sampled_or_not_there(load):
    assert load("dpo", loss_type="kto", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert load("dpo", loss_type="kto", per_device_train_batch_size=1, kto_kl="sampled")
    assert load("dpo", loss_type="apo_zero_unpaired", per_device_train_batch_size=1)
