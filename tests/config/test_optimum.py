"""Which options move the optimum, stage by stage: all that are marked, with values that do and that do not."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rlhf_pipeline.algorithms.preference import OBJECTIVES, Optimum, loss_optimum
from rlhf_pipeline.config.base import may_move_optimum, moves_optimum, moving_options
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.config.stages import STAGES

CRITIC = "with a wrong critic"
DECAY = ([0.0], [0.01])
# Of each option the values that leave the optimum where it is (the first is the one to go back to) and values that do
# not. Sources: closed forms of Bradley-Terry, DPO, GAE and the soft Bellman equation; docs/compare.md.
MOVES: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    "sft": {},
    "train-rm": {
        "weight_decay": DECAY,
        "center_rewards_coefficient": ([None, 0.0], [0.01, 0.1, 1.0]),
        "use_margin": ([False], [True]),
    },
    "ppo": {
        "weight_decay": DECAY,
        "kl_coef": ([0.05, 0.5], [0.0]),
        "vf_coef": ([0.1, 1.0], [0.0]),
        "gamma": ([1.0], [0.99, 0.0]),
        "whiten_rewards": ([False], [True]),
        "missing_eos_penalty": ([None, 0.0], [1.0]),
        "temperature": ([1.0], [0.7]),
        "reward_combination": (["sum"], ["min", "mean_minus_std"]),
    },
    "dpo": {
        "weight_decay": DECAY,
        "ref_model": ([None], ["other"]),
        "loss_type": (["sigmoid", "plackett_luce"], ["ipo", "ipo_mean", "sigmoid_norm", "apo_zero", *UNPAIRED]),
        "label_smoothing": ([0.0], [0.1]),
        "use_margin": ([False], [True]),
    },
    "collect": {"labels": (["bradley-terry"], ["rank"])},
}
SEVERAL = {"reward_model_path": None, "reward_functions": ["world", "module:function"]}
BESIDE = {"reward_combination": SEVERAL}
"""Keys that an option needs beside it."""
MAY_MOVE = {"ppo": {"lam": ([1.0], [0.95, 0.0])}}


def marked(stage: str, *, conditional: bool) -> set[str]:
    fields = STAGES[stage].model_fields
    extras = {name: field.json_schema_extra or {} for name, field in fields.items()}
    return {n for n, e in extras.items() if e.get("moves_optimum") and bool(e["condition"]) == conditional}


@pytest.mark.parametrize("stage", STAGES)
def test_every_marked_option_is_in_the_table(stage):
    assert marked(stage, conditional=False) == set(MOVES[stage])
    assert marked(stage, conditional=True) == set(MAY_MOVE.get(stage, {}))
    for name, field in STAGES[stage].model_fields.items():
        said = "moves the optimum" in field.description
        assert said == (name in MOVES[stage] or name in MAY_MOVE.get(stage, {})), name


@pytest.mark.parametrize("stage", STAGES)
def test_each_option_moves_the_optimum_at_these_values_and_not_at_those(load, stage):
    assert moves_optimum(load(stage)) == {}
    for name, (neutral, moving) in MOVES[stage].items():
        for value in neutral:
            assert moves_optimum(load(stage, **BESIDE.get(name, {}), **{name: value})) == {}, (name, value)
        for value in moving:
            assert moves_optimum(load(stage, **BESIDE.get(name, {}), **{name: value})) == {name: value}


def test_a_discount_of_what_the_critic_misses_is_no_reason_to_refuse(load):
    """The default .95 has DPO's optimum with the right critic; lam 1 with any."""
    assert may_move_optimum(load("ppo")) == {"lam": 0.95} and moves_optimum(load("ppo", lam=0.5)) == {}
    assert may_move_optimum(load("ppo", lam=1.0)) == {}
    assert STAGES["ppo"].model_fields["lam"].description.endswith(f"moves the optimum {CRITIC}")


def test_a_critic_that_is_never_trained_matters_only_below_lambda_1(load):
    assert moves_optimum(load("ppo", vf_coef=0, lam=0.95)) == {"vf_coef": 0.0}
    assert moves_optimum(load("ppo", vf_coef=0, lam=1)) == {}


def test_a_combination_needs_two_rewards(faults):
    assert "reward_combination" in faults("ppo", reward_combination="min")


def test_values_of_an_earlier_release_are_read_with_todays_defaults():
    found = moving_options(STAGES["train-rm"], {"center_rewards_coefficient": 0.1, "gone": 1})
    assert found == {"center_rewards_coefficient": 0.1}
    parts = [{"source": "world"}, {"source": "rm", "weight": 0.5}]
    assert moving_options(STAGES["ppo"], {"reward_functions": parts}) == {"reward_functions": parts}


def test_each_loss_declares_its_optimum():
    declared = {name: objective.optimum for name, objective in OBJECTIVES.items()}
    others = dict.fromkeys(("ipo_mean", "sigmoid_norm", "apo_zero"), "other")
    assert declared == {"sigmoid": "same", "plackett_luce": "same", "ipo": "scale", **others}
    assert set(declared.values()) <= set(get_args(Optimum))
    neutral = STAGES["dpo"].model_fields["loss_type"].json_schema_extra["neutral"]
    assert set(neutral) == {name for name, kind in declared.items() if kind == "same"}
    assert loss_optimum("sigmoid", 0.1) == "scale" and loss_optimum("sigmoid", 0.0) == "same"
    assert loss_optimum("ipo_mean", 0.1) == "other"
