"""Exact figures against closed forms worked out by hand or by another way."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.data import world
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.evaluation.closed_forms import (
    RewardLaw,
    beta_grid,
    frontier,
    kl_divergence,
    log_partition,
    optimum,
    policy_figures,
    require_mass,
    world_reward,
)
from rlhf_pipeline.evaluation.enumeration import ResponseTree

LOG = torch.log(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
REWARD = torch.tensor([0.0, math.log(2.0), math.log(4.0)], dtype=torch.float64)


def random_policy(seed: int, size: int = 3) -> torch.Tensor:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log_softmax(2 * logits, -1)


def test_the_optimum_by_hand():
    # beta 1: weights .5 x 1, .25 x 2, .25 x 4 = .5, .5, 1; Z = 2.
    assert log_partition(LOG, REWARD, 1.0) == pytest.approx(math.log(2.0), abs=1e-15)
    assert optimum(LOG, REWARD, 1.0).exp().tolist() == pytest.approx([0.25, 0.25, 0.5], abs=1e-15)
    # beta .5: weights .5, .25 x 4, .25 x 16 = .5, 1, 4; Z = 5.5.
    assert optimum(LOG, REWARD, 0.5).exp().tolist() == pytest.approx([0.5 / 5.5, 1 / 5.5, 4 / 5.5], abs=1e-15)


def test_figures_of_the_reference_by_hand():
    found = policy_figures(LOG, LOG, REWARD, 1.0)
    mean = 0.75 * math.log(2.0)  # .25 log 2 + .25 log 4
    assert (found.reward, found.kl, found.objective) == pytest.approx((mean, 0.0, mean), abs=1e-15)
    assert found.attainable == pytest.approx(math.log(2.0) - mean, abs=1e-15)
    assert found.gap == pytest.approx(found.attainable, abs=1e-15)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_gap_is_beta_times_the_kl_to_the_optimum(beta, seed):
    found = policy_figures(random_policy(seed), LOG, REWARD, beta)
    assert beta * log_partition(LOG, REWARD, beta) - found.objective == pytest.approx(found.gap, abs=1e-12)
    assert found.gap > 0


def test_a_collapsed_policy_has_figures_too():
    point = torch.tensor([0.0, -math.inf, -math.inf], dtype=torch.float64)
    found = policy_figures(point, LOG, REWARD, 1.0)
    assert (found.reward, found.kl) == pytest.approx((0.0, math.log(2.0)), abs=1e-15)
    assert found.gap == pytest.approx(math.log(4.0), abs=1e-15)  # pi* gives it 1/4


def test_probabilities_that_are_none_are_refused():
    assert require_mass(LOG, "p") == pytest.approx(1.0, abs=1e-15)
    with pytest.raises(RunFailed, match=r"sum to 1\.0001"):
        require_mass(LOG + 1e-4, "p")
    with pytest.raises(RunFailed):
        require_mass(torch.tensor([math.nan]), "p")


def test_the_law_of_the_reward_gives_the_same_optimum():
    reward = torch.tensor([1.0, -0.5, 1.0, 0.25], dtype=torch.float64)
    ref = random_policy(7, 4)
    law = RewardLaw.of(ref, reward)
    assert law.values.tolist() == [-0.5, 0.25, 1.0]
    mean, kl, log_z = law.optimum(0.3)
    best = optimum(ref, reward, 0.3)
    assert mean == pytest.approx(float((best.exp() * reward).sum()), abs=1e-12)
    assert kl == pytest.approx(kl_divergence(best, ref), abs=1e-12)
    assert log_z == pytest.approx(log_partition(ref, reward, 0.3), abs=1e-12)


def test_no_policy_crosses_the_frontier_and_the_optimum_touches_it():
    rewards = [REWARD, torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)]
    references = [LOG, random_policy(3)]
    curve = frontier([RewardLaw.of(*pair) for pair in zip(references, rewards, strict=True)], beta_grid())
    for beta in (0.05, 0.4, 3.0):
        found = [policy_figures(optimum(p, r, beta), p, r, beta) for p, r in zip(references, rewards, strict=True)]
        kl, reward = (sum(getattr(item, name) for item in found) / 2 for name in ("kl", "reward"))
        assert 0 <= curve.bound(kl) - reward < 1e-4  # the grid is dense, and errs upwards only
    for seed in range(50):
        found = [
            policy_figures(random_policy(100 + 2 * seed + i), p, r, 1.0)
            for i, (p, r) in enumerate(zip(references, rewards, strict=True))
        ]
        kl, reward = (sum(getattr(item, name) for item in found) / 2 for name in ("kl", "reward"))
        assert reward < curve.bound(kl)


def test_the_frontier_rises_with_falling_beta():
    curve = frontier([RewardLaw.of(LOG, REWARD)], [4.0, 2.0, 1.0, 0.5])
    assert curve.reward.diff().min() > 0 and curve.kl.diff().min() > 0
    assert beta_grid()[0] == pytest.approx(0.02) and beta_grid()[-1] == pytest.approx(50.0)


def test_the_worlds_reward_of_every_response_is_that_of_each():
    tree = ResponseTree(32, 1, 4)
    prompt = world.encode("the ending of this horror was")
    table = world_reward(prompt, tree)
    leaves = [0, 5, 31, 992, 993, 30_783, 30_784, 500_000, 954_304]
    completions = [tree.completion(leaf) for leaf in leaves]
    found = world.verdicts([prompt] * len(leaves), completions, [bool(tree.ended[leaf]) for leaf in leaves])
    assert table[leaves].tolist() == found.reward.tolist()
    good = [*world.encode("very scary"), 1]
    row = next(i for i in range(tree.num_ended) if tree.completion(i) == good)
    assert float(table[row]) == pytest.approx(4.0)  # 2 x (0 + 2)
