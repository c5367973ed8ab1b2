"""The verdict says what the figures carry and no more: A/A runs, a planted effect, and each rule by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.evaluation.seeds import contrast
from rlhf_pipeline.experiment.verdict import excludes_zero, say_contrast, verdict

SEEDS, PROMPTS = 5, 24


def entry(estimate: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    return {
        "name": "ppo - dpo",
        "kind": "as trained",
        "a": "ppo",
        "b": "dpo",
        "figure": "true_reward",
        "at": "at beta 0.5",
        "estimate": estimate,
        "why_not": None,
        "p": 0.5,
        "p_holm": None,
        "primary": True,
        **changes,
    }


def estimate(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 40, "clusters": 5, "method": "t over seeds"}


def simulated(effect: float, rng: np.random.Generator) -> dict[str, Any]:
    """A verdict on two arms whose seeds and prompts vary and whose true difference is `effect`."""
    prompts = rng.normal(size=PROMPTS)  # a prompt is as hard for the one as for the other

    def arm(shift: float) -> np.ndarray:
        seeds = rng.normal(scale=0.2, size=(SEEDS, 1))
        return shift + prompts + seeds + rng.normal(scale=0.4, size=(SEEDS, PROMPTS))

    found = contrast(arm(effect), arm(0.0))
    return verdict({"contrasts": [entry(found.estimate.as_dict(), p=found.p)], "seeds": list(range(SEEDS))})


def test_two_sets_of_seeds_of_one_arm_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    said = [simulated(0.0, rng) for _ in range(2000)]
    wrong = sum(one["certain"] for one in said) / len(said)
    assert wrong <= 0.06  # nominal 5 %, and the interval is conservative
    assert all(one["headline"].startswith("cannot tell ppo from dpo") for one in said if not one["certain"])


def test_a_planted_effect_is_found():
    rng = np.random.default_rng(1)
    said = [simulated(0.8, rng) for _ in range(500)]  # about 5 standard errors of the difference
    found = [one for one in said if one["certain"]]
    assert len(found) / len(said) >= 0.9
    assert all("ppo is ahead of dpo" in one["headline"] for one in found)
    assert all("dpo is ahead of ppo" in simulated(-2.0, rng)["headline"] for _ in range(20))


def test_a_difference_is_one_when_its_interval_excludes_zero():
    assert excludes_zero(estimate(0.3, 0.2)) and excludes_zero(estimate(-0.3, 0.2))
    assert not excludes_zero(estimate(0.1, 0.2)) and not excludes_zero(None)
    assert not excludes_zero({"mean": 1.0, "low": None, "high": None})


def test_what_would_settle_it_is_said():
    text = say_contrast(entry(estimate(0.2, 0.3)), "primary")["text"]
    assert "ppo - dpo = +0.200 [-0.100, +0.500]" in text
    # t over 5 seeds: s = .3 / 2.776 x sqrt 5; the smallest S with t(S - 1) s / sqrt S < .2 is 9.
    assert "it would take about 9 seeds to tell" in text
    assert "would take" not in say_contrast(entry(estimate(0.0, 0.3)), "primary")["text"]


def test_one_seed_speaks_of_its_runs_only():
    one = {**estimate(0.3, 0.2), "method": "t"}
    assert "not about their kind" in verdict({"contrasts": [entry(one)]})["headline"]
    assert "not about their kind" not in verdict({"contrasts": [entry(estimate(0.3, 0.2))]})["headline"]


def test_what_was_not_reached_is_said():
    said = verdict({"contrasts": [entry(None, why_not="the arms' ranges of KL do not meet")]})
    assert said["headline"].endswith("the arms' ranges of KL do not meet") and not said["certain"]


def topics(results: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in verdict(results)["lines"]:
        found.setdefault(one["topic"], []).append(one["text"])
    return found


def test_several_contrasts_are_corrected_for_their_number():
    contrasts = [
        entry(estimate(0.1, 0.5)),
        entry(estimate(0.3, 0.2), primary=False, figure="judge", p=0.02, p_holm=0.08),
    ]
    lines = verdict({"contrasts": contrasts})["lines"]
    (judge,) = [one for one in lines if one["topic"] == "judge"]
    assert not judge["certain"] and "Holm p = 0.08" in judge["text"]
    contrasts[1]["p_holm"] = 0.04
    (judge,) = [one for one in verdict({"contrasts": contrasts})["lines"] if one["topic"] == "judge"]
    assert judge["certain"]


def exact_row(stage: str, total: float, **parts: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "beta": 0.5,
        "gap_true_there": {"value": total},
        **{name: {"value": value} for name, value in parts.items()},
    }


@pytest.mark.parametrize(("own", "said"), [(0.05, "reward model's own error limits it"), (0.4, "at least half")])
def test_what_limits_ppo(own, said):
    rows = [exact_row("ppo", 0.5, optimisation_gap=own), exact_row("dpo", 0.7, disagreement=0.6)]
    found = topics({"exact": {"rows": rows}, "contrasts": []})
    assert said in found["limits"][0] and "PPO at beta 0.5 is 0.500 short" in found["limits"][0]
    assert "DPO at beta 0.5 is 0.700 short" in found["limits"][1] and "0.600" in found["limits"][1]
    assert any("for PPO" in text for text in found["next"])


def test_over_optimisation_length_and_a_useless_reward_model():
    results = {
        "contrasts": [entry(estimate(2.0, 0.5), primary=False, figure="length")],
        "rows": [{"metrics": {"length": {"mean": 10.0}}}],
        "overoptimisation": {"ppo": {"found": True, "fit": {"peak": 2.5}}, "dpo": {"found": False}},
        "preferences": {
            "scorers": {
                "longer wins": {"accuracy": {"mean": 0.55}},
                "reward@v1": {"accuracy": {"mean": 0.54}},
                "dpo@v1": {"accuracy": {"mean": 0.7}},
            }
        },
        "arms": {"ppo": {"trials": 4}, "dpo": {"trials": 1}},
        "seeds": [0],
    }
    found = topics(results)
    assert any("ppo is over-optimised beyond sqrt(KL) = 2.50" in text for text in found["limits"])
    assert any("ppo writes longer responses" in text for text in found["limits"])
    assert any("reward@v1 orders held-out pairs no better" in text for text in found["limits"])
    assert not any("dpo@v1 orders" in text for text in found["limits"])
    assert any("ppo was tuned more (ppo: 4 settings, dpo: 1 settings)" in text for text in found["next"])
    assert any("at least 3 seeds" in text for text in found["next"])


def test_arms_that_are_not_alike_come_first():
    comparable = {"ok": False, "differences": [{"what": "lengths", "values": {}}], "allowed": True}
    found = topics({"contrasts": [], "comparable": comparable, "seeds": [0, 1, 2]})
    assert found["next"] == ["train the arms alike first: they differ in lengths"]


def test_results_with_nothing_in_them_have_a_verdict():
    assert not verdict({})["certain"]
