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
        "reward_clip": ([None], [5.0]),
        "reward_scale": ([1.0], [2.0]),
        "normalize_rewards": ([False], [True]),
        "length_penalty": ([None, 0.0], [0.1]),
        "temperature": ([1.0], [0.7]),
        "reward_combination": (["sum"], ["min", "mean_minus_std"]),
        "kl_in": (["reward"], ["loss"]),
        "kl_target": ([None], [6.0]),
        "entropy_coef": ([0.0], [0.01]),
        "ptx_coef": ([0.0], [0.1]),
        "num_generations": ([8], [2, 4]),
        "scale_rewards": (["none"], ["group"]),
        "loss_normalization": (["tokens", "sequences"], ["responses"]),
    },
    "dpo": {
        "weight_decay": DECAY,
        "ref_model": ([None], ["other"]),
        "loss_type": (
            ["sigmoid", "robust", "plackett_luce"],
            [
                *("hinge", "ipo", "ipo_mean", "sigmoid_norm", "apo_zero", "simpo", "orpo", "cpo", *UNPAIRED),
                ("sigmoid", "robust"),
            ],
        ),
        "loss_weights": ([None], [(1.0, 2.0)]),
        "simpo_gamma": ([None], [1.0]),
        "cpo_alpha": ([None], [0.5]),
        "sft_weight": ([0.0], [0.1]),
        "label_smoothing": ([0.0], [0.1]),
        "use_margin": ([False], [True]),
        "f_divergence": (["reverse_kl"], ["forward_kl", "js", "alpha"]),
        "f_alpha": ([None], [0.2]),
        "sync_ref_model": ([False], [True]),
        "ref_model_mixup_alpha": ([None], [0.3]),
        "ref_model_sync_steps": ([None], [7]),
        "ld_alpha": ([None, 1.0], [0.5, 0.0]),
    },
    "collect": {"labels": (["bradley-terry"], ["rank"]), "flip_rate": ([0.0], [0.1])},
}
SEVERAL = {"reward_model_path": None, "reward_functions": ["world", "module:function"]}
GRPO = {"algorithm": "grpo"}
PER_TOKEN = {**GRPO, "kl_in": "loss"}
BESIDE = {
    "reward_combination": SEVERAL,
    "loss_weights": {"loss_type": ("sigmoid", "hinge")},
    "simpo_gamma": {"loss_type": "simpo"},
    "cpo_alpha": {"loss_type": "cpo"},
    "f_alpha": {"f_divergence": "alpha"},
    "kl_in": GRPO,
    "ptx_coef": {"ptx_dataset": "org/text"},
    **dict.fromkeys(("num_generations", "scale_rewards", "loss_normalization"), PER_TOKEN),
    "ref_model_mixup_alpha": {"sync_ref_model": True},
    "ref_model_sync_steps": {"sync_ref_model": True},
}
"""Keys that an option needs beside it."""
ALONG = {"kl_in": {"num_generations": 8}}
"""What an option makes others do."""
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
        beside = BESIDE.get(name, {})
        around = {key: beside[key] for key in beside.keys() & MOVES[stage].keys()}
        around |= {"num_generations": 8} if beside == PER_TOKEN else {}
        for value in neutral:
            assert moves_optimum(load(stage, **beside, **{name: value})) == around, (name, value)
        for value in moving:
            found = moves_optimum(load(stage, **beside, **{name: value}))
            assert found == {**around, **ALONG.get(name, {}), name: value}


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "rloo", "grpo"])
def test_no_algorithm_moves_the_optimum_by_itself(load, algorithm):
    """With the KL in the return every advantage is 0 there, whatever reshapes advantages."""
    assert moves_optimum(load("ppo", algorithm=algorithm, num_generations=4)) == {}
    assert may_move_optimum(load("ppo", algorithm=algorithm)) == (
        {} if algorithm in ("rloo", "grpo") else {"lam": 0.95}
    )
    reshaped = {"scale_rewards": "group", "loss_normalization": "responses"}
    assert moves_optimum(load("ppo", **GRPO, **reshaped)) == {}


def test_the_kl_of_responses_in_the_loss_moves_nothing(load):
    assert moves_optimum(load("ppo", algorithm="rloo", kl_in="response_loss", num_generations=4)) == {}


def test_the_published_grpo_states_the_size_of_its_groups(load):
    published = {"kl_in": "loss", "scale_rewards": "group", "loss_normalization": "responses"}
    assert moves_optimum(load("ppo", **GRPO, **published)) == {**published, "num_generations": 8}


def test_a_discount_of_what_the_critic_misses_is_no_reason_to_refuse(load):
    """The default .95 has DPO's optimum with the right critic; lam 1 with any."""
    assert may_move_optimum(load("ppo")) == {"lam": 0.95} and moves_optimum(load("ppo", lam=0.5)) == {}
    assert may_move_optimum(load("ppo", lam=1.0)) == {}
    assert STAGES["ppo"].model_fields["lam"].description.endswith(f"moves the optimum {CRITIC}")


def test_a_critic_that_is_never_trained_matters_only_below_lambda_1(load):
    assert moves_optimum(load("ppo", vf_coef=0, lam=0.95)) == {"vf_coef": 0.0}
    assert moves_optimum(load("ppo", vf_coef=0, lam=1)) == {}


def test_the_rate_of_flips_that_robust_dpo_corrects_moves_nothing(load):
    assert moves_optimum(load("dpo", loss_type="robust", label_smoothing=0.2)) == {}


def test_a_combination_needs_two_rewards(faults):
    assert "reward_combination" in faults("ppo", reward_combination="min")


def test_values_of_an_earlier_release_are_read_with_todays_defaults():
    found = moving_options(STAGES["train-rm"], {"center_rewards_coefficient": 0.1, "gone": 1})
    assert found == {"center_rewards_coefficient": 0.1}
    parts = [{"source": "world"}, {"source": "rm", "weight": 0.5}]
    assert moving_options(STAGES["ppo"], {"reward_functions": parts}) == {"reward_functions": parts}


def test_each_loss_declares_its_optimum():
    declared = {name: objective.optimum for name, objective in OBJECTIVES.items()}
    others = dict.fromkeys(
        ("hinge", "ipo_mean", "sigmoid_norm", "apo_zero", "apo_down", "simpo", "orpo", "cpo"), "other"
    )
    assert declared == {"sigmoid": "same", "robust": "same", "plackett_luce": "same", "ipo": "scale", **others}
    assert set(declared.values()) <= set(get_args(Optimum))
    neutral = STAGES["dpo"].model_fields["loss_type"].json_schema_extra["neutral"]
    assert set(neutral) == {name for name, kind in declared.items() if kind == "same"}
    assert loss_optimum("sigmoid", 0.1) == "scale" and loss_optimum("sigmoid", 0.0) == "same"
    assert loss_optimum("ipo_mean", 0.1) == "other"
    assert loss_optimum("robust", 0.1) == "same"
