"""DPO's losses in its config."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.dpo import DpoConfig


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "plackett_luce"])
def test_a_loss_may_stand_in_a_list_of_one_as_trl_writes_it(load, name):
    assert load("dpo", loss_type=name).loss_type == load("dpo", loss_type=[name]).loss_type == name


@pytest.mark.parametrize("value", ["hinge", "robust", "bco_pair", "Sigmoid", ["sigmoid", "ipo"]])
def test_a_loss_that_is_not_there_is_refused_with_those_that_are(faults, value):
    refused = faults("dpo", loss_type=value)
    assert list(refused) == ["loss_type"]
    assert repr(value) in refused["loss_type"].found
    assert refused["loss_type"].expected == "one of sigmoid, ipo, ipo_mean, sigmoid_norm, apo_zero, plackett_luce"


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

    assert set(get_args(DpoConfig.model_fields["loss_type"].annotation)) == set(OBJECTIVES)
