"""Contrasts of arms from made-up figures: pairing by seed and prompt, matched KL, choosing settings, Holm."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rlhf_pipeline.compare.aim import Aim, aim_of
from rlhf_pipeline.compare.arms import arms_of, common_seeds, paired_by_seed
from rlhf_pipeline.compare.contrasts import compare_arms, contrasts_of, selected_setting
from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.compare.rows import Measured
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.sampled import Samples
from rlhf_pipeline.registry.parents import beta_of
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import Exact, ExactRow, Gibbs
from rlhf_pipeline.report.sides import Contrast

PROMPTS, SAMPLES = 6, 4


def samples(**figures: Any) -> Samples:
    """Samples whose figure of prompt p is the value given for it, the same for each of its responses."""
    examples = [Example([1], [[2]] * SAMPLES, [True] * SAMPLES, f"p{p}", "x") for p in range(PROMPTS)]
    made = Samples(examples, [example.prompt_key for example in examples for _ in range(SAMPLES)])
    for name, values in figures.items():
        made.values[name] = np.repeat(np.broadcast_to(np.asarray(values, dtype=np.float64), (PROMPTS,)), SAMPLES)
    return made


def point(arm: str, seed: int | None, beta: float, **figures: Any) -> Measured:
    validation = figures.pop("validation", None)
    name = f"{arm}-{beta:g}-{seed}"
    config = {"beta" if arm == "dpo" else "kl_coef": beta}
    manifest = SimpleNamespace(config=config, cost={"flops": 100.0, "wall_seconds": 1.0}, parents={}, seed=seed)
    model = SimpleNamespace(label=name, manifest=manifest, step=None, stage=arm, digest=name, method=None)
    figures = {"length": 3.0, **figures}
    checked = None if validation is None else samples(length=3.0, **validation)
    return Measured(Point(arm, seed, {"beta": beta}, name), model, samples(**figures), checked)


def found(entries: list[Contrast], **wanted: Any) -> Contrast:
    (entry,) = [e for e in entries if all(getattr(e, key) == value for key, value in wanted.items())]
    return entry


def contrasts(measured: list[Measured], **options: Any) -> list[Contrast]:
    a, b = arms_of(measured)
    chosen = {"chooser": None, "swept": len(a.settings) > 1, "registry": None, **options}
    return contrasts_of(a, b, ["true_reward", "kl"], **chosen)


def test_a_difference_is_taken_prompt_by_prompt_and_seed_by_seed():
    hard = np.linspace(-3, 3, PROMPTS)  # prompts differ far more than arms
    measured = [
        point(arm, seed, 0.5, true_reward=hard + shift + 10 * seed, kl=1.0)
        for arm, shift in (("ppo", 0.4), ("dpo", 0.0))
        for seed in (0, 1, 2)
    ]
    entry = found(contrasts(measured), figure="true_reward")
    assert (entry.kind, entry.at, entry.name) == ("as trained", "at beta 0.5", "ppo - dpo")
    estimate = entry.estimate
    # Paired, nothing is left of the spread between prompts (sd 2) and seeds (sd 10).
    assert estimate.mean == pytest.approx(0.4) and estimate.high - estimate.low < 1e-9


def test_seeds_that_the_arms_do_not_share_are_left_out():
    measured = [point("ppo", s, 0.5, true_reward=float(s), kl=1.0) for s in (0, 1, 2)]
    measured += [point("dpo", s, 0.5, true_reward=0.0, kl=1.0) for s in (1, 2, 3)]
    a, b = arms_of(measured)
    assert common_seeds(a, b) == [1, 2] and paired_by_seed(a, b)[2] == [1, 2]
    assert found(contrasts(measured), figure="true_reward").estimate.mean == pytest.approx(1.5)


def test_single_seeds_of_different_number_are_paired():
    measured = [point("ppo", 0, 0.5, true_reward=1.0, kl=1.0), point("dpo", 7, 0.5, true_reward=0.25, kl=1.0)]
    assert found(contrasts(measured), figure="true_reward").estimate.mean == pytest.approx(0.75)
    several = [*measured, point("dpo", 8, 0.5, true_reward=0.0, kl=1.0)]
    assert contrasts(several)[0].why_not == "the arms have no seeds in common"


def swept(shift: float = 0.3, far: float = 0.0) -> list[Measured]:
    """Two arms at three betas: reward 2 sqrt(KL), that of ppo higher by `shift`; dpo's KLs moved by `far`."""
    made = []
    for seed in (0, 1, 2):
        for beta, kl in ((1.0, 1.0), (0.5, 2.0), (0.1, 4.0)):
            for arm, gain, move in (("ppo", shift, 0.0), ("dpo", 0.0, far)):
                figures = {"kl": kl + move, "true_reward": 2 * np.sqrt(kl) + gain + np.linspace(-1, 1, PROMPTS)}
                figures["score"] = kl - (kl - 2) ** 2  # best at KL 2.5 or so: beta .5
                made.append(point(arm, seed, beta, validation=dict(figures), **figures))
    return made


def test_matched_kl_finds_the_shift_and_says_where():
    entries = contrasts(swept(), chooser="score")
    entry = found(entries, kind="matched KL", figure="true_reward")
    assert entry.estimate.mean == pytest.approx(0.3, abs=1e-9)
    assert found(entries, kind="area", figure="true_reward").estimate.mean == pytest.approx(0.3, abs=1e-9)
    assert {e.at for e in entries if e.kind == "same beta"} == {"at beta 1", "at beta 0.5", "at beta 0.1"}


def test_an_arm_with_another_optimum_is_in_no_contrast_at_one_beta():
    measured = [
        replace(one, aim=Aim("scale", {"loss_type": "ipo"})) if one.point.arm == "dpo" else one for one in swept()
    ]
    entries = contrasts(measured, chooser="score")
    assert not any(entry.at.startswith("at beta") for entry in entries)
    left_out = found(entries, kind="same beta")
    assert left_out.estimate is None and "at one beta the optimum of dpo is different" in left_out.why_not
    assert found(entries, kind="matched KL", figure="true_reward").estimate.mean == pytest.approx(0.3, abs=1e-9)
    single = [one for one in measured if one.point.setting == {"beta": 0.5}]
    entry = found(contrasts(single), figure="true_reward")
    assert (entry.kind, entry.at) == ("as trained", "as trained, with a different optimum for dpo")
    assert entry.estimate.mean == pytest.approx(0.3)


def test_what_both_arms_do_not_reach_is_not_extrapolated():
    entries = contrasts(swept(far=10.0), chooser=None)
    entry = found(entries, kind="matched KL", figure="true_reward")
    assert entry.estimate is None and "no common range" in entry.why_not and "ppo covers" in entry.why_not


def test_points_of_equal_cost_have_no_range_of_cost():
    entry = found(contrasts(swept()), kind="cost", figure="true_reward")
    assert entry.estimate is None and "no range of cost" in entry.why_not


def test_settings_are_chosen_on_validation_prompts_by_what_a_user_has():
    measured = swept()
    ppo, dpo = arms_of(measured)
    assert selected_setting(ppo, [0, 1, 2], "score").values == {"beta": 0.5}
    for one in measured:  # the truth on the test prompts must not matter
        one.test.values["true_reward"] = -one.test.values["true_reward"]
    assert selected_setting(dpo, [0, 1, 2], "score").values == {"beta": 0.5}


def test_one_contrast_is_declared_and_the_others_are_corrected():
    measured = swept()
    baseline = point("sft", None, 1.0, true_reward=0.0, kl=0.0, score=0.0)
    registry = SimpleNamespace(resolve=None)
    made = compare_arms(measured, baseline, "true_reward", "auto", registry)
    (primary,) = [entry for entry in made.contrasts if entry.primary]
    assert (primary.kind, primary.figure, primary.p_holm) == ("matched KL", "true_reward", None)
    others = [entry for entry in made.contrasts if not entry.primary and entry.p is not None]
    assert others and all(entry.p_holm >= entry.p for entry in others)
    assert made.arms["ppo"].trials == 3 and made.arms["ppo"].selected == {"beta": 0.5}
    assert made.frontier.matched_kl == pytest.approx(2.5, abs=1.6)
    assert [row.arm for row in made.summary] == ["ppo"] * 3 + ["dpo"] * 3
    assert all(row.seeds == 3 for row in made.summary)
    assert {row.arm for row in made.ranking.rows} == {"sft", "ppo", "dpo"}
    asked = compare_arms(measured, baseline, "true_reward", "selected", registry)
    assert [entry.kind for entry in asked.contrasts if entry.primary] == ["selected"]


def test_exact_objectives_are_set_against_each_other_at_each_common_beta():
    measured = swept()
    baseline = point("sft", None, 1.0, true_reward=0.0, kl=0.0, score=0.0)
    rows = [
        ExactRow.model_construct(
            model=one.name, objective={"ppo": 2.0, "dpo": 1.5}[one.point.arm] + 0.1 * one.point.seed
        )
        for one in measured
    ]
    frontier = Gibbs(kl=[0.0, 1.0], reward=[0.0, 1.0], beta=[9.0, 1.0])
    exact = Exact.model_construct(rows=rows, reward="world", frontier=frontier)
    made = compare_arms(measured, baseline, "true_reward", "auto", SimpleNamespace(resolve=None), exact=exact)
    entries = [entry for entry in made.contrasts if entry.kind == "exact"]
    assert [entry.at for entry in entries] == [f"at beta {b}, on these prompts" for b in ("1", "0.5", "0.1")]
    for entry in entries:  # paired by seed: what the seeds share cancels
        assert entry.estimate.mean == pytest.approx(0.5)
        assert entry.estimate.method == "t over seeds"
    assert made.frontier.gibbs.kl == [0.0, 1.0]


def adaptive(seed: int, last: float | None) -> Measured:
    """PPO that began at beta 1 with an adaptive penalty, which ended at `last`."""
    one = point("ppo", seed, 1.0, true_reward=1.0, kl=1.0)
    manifest = one.model.manifest
    manifest.config["kl_target"], manifest.stage, manifest.may_move_optimum = 6.0, "ppo", {}
    manifest.metrics, manifest.moves_optimum = {"train": {"objective/kl_coef": last}}, {"kl_target": 6.0}
    return replace(one, aim=aim_of(cast(Registry, None), one.model))


def test_an_adaptive_penalty_has_the_beta_where_it_ended():
    assert beta_of(adaptive(0, 0.25).model) == 0.25
    (one,) = arms_of([adaptive(0, 0.25)])
    (setting,) = one.settings
    assert (one.optimum(setting), one.beta(setting)) == ("same", 0.25)
    (two,) = arms_of([adaptive(0, 0.25), adaptive(1, 0.75)])
    assert two.beta(two.settings[0]) == 0.5
    unknown = adaptive(0, None)
    assert unknown.aim.optimum == "other" and beta_of(unknown.model) is None
    snapshot = adaptive(0, 0.25).model
    snapshot.step = 3
    assert beta_of(snapshot) is None


def test_an_adaptive_penalty_is_told_from_the_beta_it_began_with():
    dpo = point("dpo", 0, 1.0, true_reward=0.0, kl=1.0)
    (entry,) = [one for one in contrasts([adaptive(0, 0.25), dpo]) if one.figure == "true_reward"]
    assert entry.at == "as trained (ppo at beta 0.25, dpo at 1)"
    (entry,) = [one for one in contrasts([adaptive(0, 1.0), dpo]) if one.figure == "true_reward"]
    assert entry.at == "at beta 1"


def test_settings_that_cannot_be_paired_and_have_no_kl_are_said():
    """Two values of another option at one beta in each arm, and no reference to measure KL to."""
    several = [
        replace(one, point=replace(one.point, setting={"learning_rate": rate}))
        for arm in ("ppo", "dpo")
        for rate in (0.1, 0.2)
        for one in [point(arm, 0, 1.0, true_reward=1.0)]
    ]
    a, b = arms_of(several)
    (entry,) = contrasts_of(a, b, ["true_reward"], None, True, cast(Registry, None))
    assert (entry.kind, entry.estimate) == ("same beta", None)
    assert entry.why_not == "no beta is that of exactly one setting of each arm"
