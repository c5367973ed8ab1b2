"""DPO's losses in its config."""

from __future__ import annotations

from typing import get_args

import pytest

from rlhf_pipeline.algorithms.preference import OBJECTIVES
from rlhf_pipeline.config.base import spelled
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.losses import DIFFERENCES, REFERENCE_FREE, LossType


@pytest.mark.parametrize(
    "name", ["sigmoid", "robust", "hinge", "ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "plackett_luce", *UNPAIRED]
)
def test_a_loss_may_stand_in_a_list_of_one_as_trl_writes_it(load, name):
    assert load("dpo", loss_type=name).loss_type == load("dpo", loss_type=[name]).loss_type == name


@pytest.mark.parametrize("value", ["exo_pair", "bco_pair", "Sigmoid"])
def test_a_loss_that_is_not_there_is_refused_with_those_that_are(faults, value):
    refused = faults("dpo", loss_type=value)
    assert list(refused) == ["loss_type"]
    assert repr(value) in refused["loss_type"].found
    assert refused["loss_type"].expected == f"one of {', '.join((*OBJECTIVES, *UNPAIRED))}"


@pytest.mark.parametrize(
    "name", ["hinge", "ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "simpo", "orpo", "cpo", "plackett_luce"]
)
def test_smoothing_belongs_to_the_losses_that_define_it(load, faults, name):
    for defined in ("sigmoid", "robust"):
        assert load("dpo", label_smoothing=0.1, loss_type=defined).label_smoothing == 0.1
        assert OBJECTIVES[defined].smoothing is not None
    assert OBJECTIVES[name].smoothing is None
    assert load("dpo", label_smoothing=0, loss_type=name).loss_type == name
    refused = faults("dpo", label_smoothing=0.1, loss_type=name)
    assert refused["label_smoothing"].found == f"label_smoothing 0.1 with loss_type {name}"
    assert "loss_type sigmoid or robust" in refused["label_smoothing"].expected


def test_a_loss_without_a_minimum_needs_early_stopping(load, faults):
    refused = faults("dpo", loss_type="apo_down")
    assert list(refused) == ["loss_type"] and "has no minimum" in refused["loss_type"].found
    assert "early_stopping_patience" in refused["loss_type"].expected
    for stop in ({"early_stopping_patience": 2}, {"load_best_model_at_end": True}):
        assert load("dpo", loss_type="apo_down", eval_steps=5, **stop).loss_type == "apo_down"


def test_an_option_of_one_loss_is_refused_with_another(load, faults):
    for key, owner, value in (("simpo_gamma", "simpo", 0.0), ("cpo_alpha", "cpo", 2.0)):
        assert getattr(load("dpo", loss_type=owner, **{key: value}), key) == value
        for other in ("sigmoid", "orpo"):
            refused = faults("dpo", loss_type=other, **{key: value})
            assert list(refused) == [key] and f"with loss_type {other}" in refused[key].found
            assert f"loss_type {owner}" in refused[key].expected


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_a_loss_without_a_reference_refuses_one(load, faults, name):
    assert not OBJECTIVES[name].needs_reference and set(load("dpo", loss_type=name).parents()) == {"base"}
    refused = faults("dpo", loss_type=name, ref_model="sft")
    assert list(refused) == ["ref_model"] and "has no reference" in refused["ref_model"].found
    refused = faults("dpo", loss_type=name, dataset_name="world:verdicts", max_steps=3)
    assert list(refused) == ["dataset_name"] and "drawn from the reference" in refused["dataset_name"].found


def test_the_weight_of_the_sft_loss(load):
    """sft_weight, and what the loss itself has of it: 1 in ORPO, cpo_alpha in CPO."""
    cases = [({}, 0.0), ({"sft_weight": 0.3}, 0.3), ({"loss_type": "orpo"}, 1.0), ({"loss_type": "cpo"}, 1.0)]
    cases += [({"loss_type": "cpo", "cpo_alpha": 0.0}, 0.0), ({"loss_type": "orpo", "sft_weight": 0.5}, 1.5)]
    for changes, weight in cases:
        assert load("dpo", **changes).sft_term == weight


def test_an_sft_loss_needs_responses_that_were_chosen(faults):
    for key, changes in (("sft_weight", {"sft_weight": 0.2}), ("loss_type", {"loss_type": "orpo"})):
        refused = faults("dpo", soft_labels=True, **changes)
        assert list(refused) == [key] and "probabilities choose none" in refused[key].found
    refused = faults("dpo", sft_weight=0.2, dataset_name="world:verdicts", max_steps=3)
    assert list(refused) == ["sft_weight"]


def test_a_divergence_belongs_to_losses_of_a_difference_of_rewards(load, faults):
    assert load("dpo", f_divergence_type="js_divergence").f_divergence == "js"
    config = load("dpo", f_divergence="alpha_divergence", f_alpha_divergence_coef=0.2)
    assert (config.f_divergence, config.alpha) == ("alpha", 0.2) and load("dpo", f_divergence="alpha").alpha == 0.5
    for name in OBJECTIVES:
        stop = {"load_best_model_at_end": True, "eval_steps": 1} if name == "apo_down" else {}
        refused = faults("dpo", f_divergence="forward_kl", loss_type=name, **stop) if name not in DIFFERENCES else {}
        assert list(refused) == ([] if name in DIFFERENCES else ["f_divergence"])
        if name in DIFFERENCES:
            assert load("dpo", f_divergence="forward_kl", loss_type=name).f_divergence == "forward_kl"
    refused = faults("dpo", f_alpha=0.3)
    assert list(refused) == ["f_alpha"] and "f_divergence alpha" in refused["f_alpha"].expected
    assert list(faults("dpo", f_divergence="kl")) == ["f_divergence"]


def test_length_desensitised_dpo_needs_pairs_and_a_reference(load, faults):
    assert not load("dpo", ld_alpha=0.5).caches_reference and load("dpo").caches_reference
    for name in (*REFERENCE_FREE, "plackett_luce"):
        assert list(faults("dpo", ld_alpha=0.5, loss_type=name)) == ["ld_alpha"]
    assert list(faults("dpo", ld_alpha=0.5, dataset_name="world:verdicts", max_steps=3)) == ["dataset_name"]
    assert list(faults("dpo", ld_alpha=1.5)) == ["ld_alpha"]


def test_a_reference_that_moves(load, faults):
    config = load("dpo", sync_ref_model=True)
    assert (config.mixup_alpha, config.sync_steps, config.caches_reference) == (0.6, 512, False)
    for key, value in (("ref_model_mixup_alpha", 0.3), ("ref_model_sync_steps", 7)):
        assert getattr(load("dpo", sync_ref_model=True, **{key: value}), key) == value
        refused = faults("dpo", **{key: value})
        assert list(refused) == [key] and "sync_ref_model true" in refused[key].expected
    for changes in ({"loss_type": "cpo"}, {"use_peft": True}):
        assert list(faults("dpo", sync_ref_model=True, **changes)) == ["sync_ref_model"]
    assert list(faults("dpo", sync_ref_model=True, dataset_name="world:verdicts", max_steps=3)) == ["dataset_name"]
    assert list(faults("dpo", sync_ref_model=True, ref_model_mixup_alpha=0.0)) == ["ref_model_mixup_alpha"]


def test_a_list_is_a_sum_with_weights(load):
    config = load("dpo", loss_type=["sigmoid", "hinge", "sft"], loss_weights=[0.8, 0.2, 1.5])
    assert config.losses == (("sigmoid", 0.8), ("hinge", 0.2)) and config.sft_term == 1.5
    config = load("dpo", loss_type=["sigmoid", "cpo"], cpo_alpha=0.5, sft_weight=0.1)
    assert config.losses == (("sigmoid", 1.0), ("cpo", 1.0)) and config.sft_term == 0.6
    assert config.needs_reference and set(config.parents()) == {"base", "reference"}
    assert not load("dpo", loss_type=["simpo", "orpo"]).needs_reference
    assert load("dpo", loss_type=["robust", "hinge"], label_smoothing=0.1).label_smoothing == 0.1


@pytest.mark.parametrize(
    ("key", "changes", "said"),
    [
        ("loss_type", {"loss_type": ["sigmoid", "exo_pair"]}, "and sft"),
        ("loss_type", {"loss_type": ["sigmoid", "sigmoid"]}, "different names"),
        ("loss_type", {"loss_type": "sft"}, "one of sigmoid"),
        ("loss_weights", {"loss_weights": [1.0]}, "no loss_weights, or a list"),
        ("loss_weights", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "2 weights"),
        ("label_smoothing", {"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1}, "or loss_type sigmoid"),
        ("ref_model", {"loss_type": ["simpo", "cpo"], "ref_model": "sft"}, "no ref_model"),
    ],
)
def test_a_list_of_losses_that_makes_no_sense_is_refused(faults, key, changes, said):
    refused = faults("dpo", **changes)
    assert list(refused) == [key] and said in refused[key].expected


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
    assert set(get_args(LossType)) == {*OBJECTIVES, *UNPAIRED}


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


def test_several_losses_are_named_without_brackets(faults):
    two = {"loss_type": ["sigmoid", "hinge"]}
    refused = faults("dpo", **two, desirable_weight=2.0)
    assert refused["desirable_weight"].found == "found 2.0 with loss_type sigmoid + hinge, which does not read it"
    refused = faults("dpo", **two, use_margin=True)
    assert refused["use_margin"].found == "found true with loss_type sigmoid, hinge, which defines no margin"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("ipo", "ipo"),
        (0.1, "0.1"),
        (True, "True"),
        (("sigmoid", "hinge"), "sigmoid + hinge"),
        ([{"source": "a", "weight": 2.0}, {"source": "b"}], "source a weight 2.0 + source b"),
    ],
)
def test_a_value_in_words(value, text):
    assert spelled(value) == text


def test_robust_without_a_share_of_flips_is_told_to_be_sigmoid():
    def notes(**changes) -> tuple[str, ...]:
        given = {"model_name_or_path": "sft", "dataset_name": "org/data", "output_name": "m", **changes}
        return load_config("dpo", None, extra=given).notes

    (note,) = notes(loss_type="robust")
    assert note == "loss_type robust without label_smoothing is sigmoid: label_smoothing is the share of flipped labels"
    assert notes(loss_type=["robust", "sft"]) == (note,)
    assert not notes(loss_type="robust", label_smoothing=0.2) and not notes()
