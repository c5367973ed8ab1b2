"""Scaled and normalised scores: by hand, and on the tree of 31 responses as PPO at another beta."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.algorithms.moments import Moments
from rlhf_pipeline.rollout.rollout import Rollout
from rlhf_pipeline.training.cost import CostMeter
from rlhf_pipeline.training.ppo_batches import Scored
from rlhf_pipeline.training.ppo_rollouts import PpoSetup
from rlhf_pipeline.training.shaping import restored, shaped
from tests.rollout.tree import BETA, EOS, REWARD, Table, World, config_of, error, expected_step, leaves_of

DEVIATION = REWARD.std(correction=0).item()
"""Of the 31 scores of the tree's only rollout."""


def scored(*scores: float) -> Scored:
    """A rollout of responses of two tokens, of which the last is cut."""
    flat = torch.zeros(len(scores), 2)
    ended = torch.tensor([True] * (len(scores) - 1) + [False])
    rollout = Rollout([], flat == 0, ended, torch.tensor(scores), flat, flat, None, flat)
    return Scored(0, rollout, [], [], 0)


def setup_of(**changes) -> PpoSetup:
    nothing = SimpleNamespace()
    return PpoSetup(config_of(2, **changes), nothing, nothing, nothing, [], [EOS], CostMeter(), {})


def test_normalised_scores_by_hand():
    """1 and 3 have mean 2 and deviation 1; with 5 and 7 the mean is 4 and the deviation the root of 5."""
    setup = setup_of(normalize_rewards=True)
    first = shaped(setup, scored(1.0, 3.0))
    assert first.rollout.scores.tolist() == [-1, 1]
    assert first.told == {
        "objective/raw_scores": 2,
        "objective/running_mean": 2,
        "objective/running_std": 1,
        "objective/effective_kl_coef": BETA,
    }
    second = shaped(setup, scored(5.0, 7.0))
    assert second.rollout.scores.tolist() == pytest.approx([1 / 5**0.5, 3 / 5**0.5], rel=1e-6)
    assert second.told["objective/raw_scores"] == 6
    assert second.told["objective/effective_kl_coef"] == pytest.approx(BETA * 5**0.5, rel=1e-12)
    resumed = setup_of(normalize_rewards=True)
    resumed.moments = restored({**second.told, "episodes": 4.0})
    assert resumed.moments == setup.moments
    assert restored({"episodes": 4.0}) == Moments()


def test_scores_are_scaled_before_they_are_clipped_and_lowered():
    changes = {"reward_scale": 2.0, "reward_clip": 5.0, "length_penalty": 0.25, "missing_eos_penalty": 1.0}
    found = shaped(setup_of(**changes), scored(1.0, 3.0))
    assert found.rollout.scores.tolist() == [2 - 0.5, 5 - 0.5 - 1]
    assert found.told == {"objective/effective_kl_coef": BETA / 2}
    both = shaped(setup_of(normalize_rewards=True, reward_scale=3.0), scored(1.0, 5.0))
    assert both.rollout.scores.tolist() == [-3, 3]
    assert both.told["objective/effective_kl_coef"] == pytest.approx(BETA * 2 / 3)


def test_equal_scores_are_0_and_plain_ones_stay():
    setup = setup_of(normalize_rewards=True)
    assert shaped(setup, scored(3.0, 3.0)).rollout.scores.tolist() == [0, 0]
    given = scored(1.0, 3.0)
    plain = shaped(setup_of(), given)
    assert plain.rollout.scores is given.rollout.scores and plain.told == {}


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return World(Table(1), Table(2))


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"reward_scale": 3.0}, 3.0),
        ({"normalize_rewards": True}, 1 / DEVIATION),
        ({"normalize_rewards": True, "reward_scale": 0.5}, 0.5 / DEVIATION),
    ],
)
@pytest.mark.parametrize("algorithm", [{}, {"algorithm": "rloo", "num_generations": 31}])
def test_a_step_is_that_at_beta_over_the_scale(world, algorithm, changes, scale):
    """c R - b k1 = c (R - b / c k1); the mean that is subtracted is a baseline."""
    found = expected_step(world, **algorithm, **changes)
    assert error(found, scale * expected_step(world, **algorithm, kl_coef=BETA / scale)) <= 1e-10


def test_the_optimum_is_that_of_another_beta(world):
    ref = World(world.reference, world.reference).probabilities()
    size = expected_step(World(world.reference, world.reference)).norm()

    def at(beta: float) -> World:
        tilted = ref * (REWARD / beta).exp()
        return World(leaves_of(tilted / tilted.sum()), world.reference)

    for changes, scale in (({"reward_scale": 3.0}, 3.0), ({"normalize_rewards": True}, 1 / DEVIATION)):
        assert expected_step(at(BETA / scale), **changes).norm() <= 1e-9 * size
        assert expected_step(at(BETA), **changes).norm() > 1e-2 * size
