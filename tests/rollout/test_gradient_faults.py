"""Deliberate faults: each breaks the gradient identity by more than 1e-2, where the right code keeps it to 1e-10.

A fault is put in the place of a function that the package's rollout or step calls; nothing else is changed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf_pipeline.algorithms import advantages
from rlhf_pipeline.algorithms.kl import k2, k3
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.models.modules import ActorCritic, TokenScores
from rlhf_pipeline.rollout import rollout
from rlhf_pipeline.stages import ppo
from rlhf_pipeline.training import ppo_rollouts
from tests.rollout.tree import WithValues, World, error, expected_step, network, numbers


@pytest.fixture
def off(tree, monkeypatch):
    """The relative error of the step with a fault; without it the identity has to hold."""

    def check(place=None, name: str = "", fault=None, *, module: nn.Module | None = None, **settings) -> float:
        exact = -tree.objective_gradient()
        module = module or WithValues(tree.policy, numbers(15, seed=20))
        assert error(expected_step(tree, module), exact) <= 1e-10
        if place is not None:
            monkeypatch.setattr(place, name, fault)
        return error(expected_step(tree, module, **settings), exact)

    return check


def test_an_eos_dropped_from_the_mask(off):
    def without_eos(*, mask, ended, **fields):
        length = (mask.sum(1) - ended.long()).clamp_min(1)  # EOS alone stays: a response needs a token
        return rollout.Rollout(mask=torch.arange(mask.shape[1]) < length[:, None], ended=ended, **fields)

    assert off(ppo_rollouts, "Rollout", without_eos) > 1e-2


def test_a_mean_per_sequence_in_the_place_of_the_sum(tree, off):
    right = ppo.clipped_policy_loss

    def mean(*args, **options):
        found = right(*args, **options)
        return replace(found, loss=found.loss / args[-1].sum())

    # With V = 0: with the exact values it changes the step as well, but not where it comes to rest.
    module = WithValues(tree.policy, torch.zeros(15, dtype=torch.float64))
    assert off(ppo, "clipped_policy_loss", mean, module=module) > 1e-2


def test_a_discount_of_95_percent(off):
    assert off(gamma=0.95) > 1e-2


@pytest.mark.parametrize("estimator", [k2, k3])
def test_another_estimator_of_the_kl_in_the_reward(off, estimator):
    assert off(advantages, "k1", estimator) > 1e-2


def test_a_kl_of_the_wrong_sign(off):
    assert off(advantages, "k1", lambda logprobs, ref_logprobs: ref_logprobs - logprobs) > 1e-2


def scored_at(place):
    """Token rewards with the score at `place(index of the last token)`."""
    right = advantages.token_rewards

    def token_rewards(scores, logprobs, ref_logprobs, mask, *, kl_coef):
        rewards = right(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef=kl_coef)
        return rewards.scatter_add(1, place(mask.sum(1) - 1)[:, None], scores[:, None])

    return token_rewards


def test_the_score_one_token_early(off):
    assert off(ppo, "token_rewards", scored_at(lambda last: (last - 1).clamp_min(0))) > 1e-2


def test_the_score_at_the_first_token(off):
    assert off(ppo, "token_rewards", scored_at(torch.zeros_like)) > 1e-2


def test_the_score_at_the_last_token_put_there_by_the_same_means_is_right(off):
    assert off(ppo, "token_rewards", scored_at(lambda last: last)) <= 1e-10


def test_old_and_new_swapped_in_the_ratio(off):
    right = ppo.clipped_policy_loss
    assert off(ppo, "clipped_policy_loss", lambda new, old, *rest, **options: right(old, new, *rest, **options)) > 1e-2


class ReadsLate(nn.Module):
    """An actor-critic whose values are read at the tokens, not at the positions that predict them."""

    actor_frozen = False

    def __init__(self, module: ActorCritic):
        super().__init__()
        self.module, self.reader = module, module.reader

    def forward(self, batch: PackedBatch) -> TokenScores:
        late = self.module(replace(batch, predict_index=batch.token_index)).values
        return replace(self.module(batch), values=late)


def test_values_that_know_the_token_they_judge():
    world = World(network(1), network(2))
    exact = -world.objective_gradient()
    assert error(expected_step(world), exact) <= 1e-10
    assert error(expected_step(world, ReadsLate(world.policy)), exact) > 1e-2
