"""The adaptive penalty: by hand, on the tree where the optimum at every penalty is known, and in runs."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.algorithms.kl import adapted_kl_coef
from tests.conftest import stopped_before
from tests.rollout.tree import REWARD, Table, World

LOG_REF = World.response_logprobs(Table(2)).detach()


def test_the_step_by_hand():
    """The error is the relative distance from the target, at most a fifth; 100 of 1000 episodes make a tenth of it."""
    aim = {"target": 2.0, "horizon": 1000, "episodes": 100}
    assert adapted_kl_coef(0.5, 2.1, **aim) == pytest.approx(0.5 * (1 + 0.05 * 0.1), abs=1e-15)
    assert adapted_kl_coef(0.5, 9.0, **aim) == pytest.approx(0.5 * 1.02, abs=1e-15)
    assert adapted_kl_coef(0.5, -0.1, **aim) == pytest.approx(0.5 * 0.98, abs=1e-15)


def ended(target: float, updates: int) -> tuple[float, float]:
    """The penalty after so many updates with a policy that is always at its optimum, and its KL to the reference."""
    kl_coef = 0.5
    for _ in range(updates):
        logp = torch.log_softmax(LOG_REF + REWARD / kl_coef, 0)
        kl = (logp.exp() * (logp - LOG_REF)).sum().item()
        kl_coef = adapted_kl_coef(kl_coef, kl, target=target, horizon=100, episodes=20)
    return kl_coef, kl


@pytest.mark.parametrize("target", [0.1, 1.0])
def test_the_penalty_ends_where_its_optimum_has_the_target(target):
    kl_coef, kl = ended(target, 400)
    assert abs(kl - target) <= 1e-6
    assert (kl_coef < 0.5) == (target > ended(target, 1)[1])  # the KL of the optimum at the first penalty, .5


def test_a_target_that_no_better_policy_has_leaves_no_penalty():
    """The best response alone has the largest KL of all optima, -log of its probability under the reference."""
    reachable = -LOG_REF[REWARD.argmax()].item()
    kl_coef, kl = ended(reachable + 0.5, 400)
    assert kl_coef < 1e-3 and kl == pytest.approx(reachable, abs=1e-6)


@pytest.mark.check
def test_a_run_follows_its_own_kl_and_resumes_bit_for_bit(lab):
    changes = {"kl_target": 0.05, "kl_horizon": 64, "max_steps": 4, "save_steps": 1}
    whole = lab.run("ppo", output_name="whole", **changes)
    rows = lab.rows(whole.run)
    expected = [0.5]
    for row in rows[:-1]:
        error = min(max(row["objective/kl"] / 0.05 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * 16 / 64))
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx(expected, rel=1e-12)
    assert rows[0]["objective/kl_coef"] == 0.5 > rows[1]["objective/kl_coef"]
    for row in rows:
        assert row["objective/non_score_reward"] == pytest.approx(-row["objective/kl_coef"] * row["objective/kl"])
    assert lab.registry.resolve(whole.model).manifest.moves_optimum == {"kl_target": 0.05}
    with stopped_before(3):
        lab.run("ppo", **changes)
    resumed = lab.run("ppo", **changes)
    assert lab.rows(resumed.run) == rows
    found, weights = lab.weights(resumed.model), lab.weights(whole.model)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
