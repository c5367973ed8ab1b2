"""Estimates and figures of a rollout, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlhf_pipeline.rollout.rollout import Rollout, apply_missing_eos_penalty, rollout_metrics, shape_scores
from tests.rollout.tree import estimate

PLAIN = {"kl_coef": 0.5, "gamma": 1.0, "lam": 1.0, "whiten_advantages": False, "whiten_rewards": False}


@pytest.fixture
def rollout() -> Rollout:
    """Two responses: of two tokens, ended; of one, cut. KL .3 and -.2; return 1.85 at the first token."""
    return Rollout(
        examples=[],
        mask=torch.tensor([[True, True], [True, False]]),
        ended=torch.tensor([True, False]),
        scores=torch.tensor([2.0, -1.0]),
        logprobs=torch.tensor([[-1.0, -0.5], [-2.0, 0.0]]),
        ref_logprobs=torch.tensor([[-1.5, -0.3], [-1.8, 0.0]]),
        values=torch.tensor([[0.5, 1.0], [0.0, 0.0]]),
        entropy=torch.zeros(2, 2),
    )


def test_estimates_by_hand(rollout):
    found = estimate(rollout, **PLAIN)
    torch.testing.assert_close(found.rewards, torch.tensor([[-0.25, 2.1], [-0.9, 0.0]]))
    torch.testing.assert_close(found.returns, torch.tensor([[1.85, 2.1], [-0.9, 0.0]]))
    torch.testing.assert_close(found.advantages, torch.tensor([[1.35, 1.1], [-0.9, 0.0]]))


def test_whitening_rewards_scales_them_around_their_mean(rollout):
    values = torch.tensor([-0.25, 2.1, -0.9])
    mean, std = values.mean(), values.std(correction=0)
    found = estimate(rollout, **{**PLAIN, "whiten_rewards": True}).rewards[rollout.mask]
    torch.testing.assert_close(found, (values - mean) / std + mean)


def test_figures_by_hand(rollout):
    found = rollout_metrics(rollout, estimate(rollout, **PLAIN), kl_coef=0.5)
    k3 = [math.expm1(-0.5) + 0.5 + math.expm1(0.2) - 0.2, math.expm1(0.2) - 0.2]
    returns, errors = [1.85, 2.1, -0.9], [1.35, 1.1, -0.9]

    def variance(values):
        mean = sum(values) / 3
        return sum((value - mean) ** 2 for value in values) / 3

    assert found == pytest.approx(
        {
            "objective/kl": 0.05,
            "objective/kl_k3": sum(k3) / 2,
            "objective/entropy": 1.75,
            "objective/scores": 0.5,
            "objective/scores_std": 1.5,
            "objective/non_score_reward": -0.025,
            "objective/rlhf_reward": 0.475,
            "val/num_eos_tokens": 1.0,
            "val/ended": 0.5,
            "val/response_length": 1.5,
            "val/explained_variance": 1 - variance(errors) / variance(returns),
        },
        abs=1e-6,
    )


def padded(rollout) -> Rollout:
    """The same rollout with three more columns."""
    fields = ("mask", "logprobs", "ref_logprobs", "values", "entropy")
    wider = {name: torch.nn.functional.pad(getattr(rollout, name), (0, 3)) for name in fields}
    return replace(rollout, **wider)


def test_padding_changes_no_figure_and_no_advantage(rollout):
    wide = padded(rollout)
    options = {**PLAIN, "whiten_advantages": True, "lam": 0.95}
    one, other = estimate(rollout, **options), estimate(wide, **options)
    torch.testing.assert_close(other.advantages[:, :2], one.advantages)
    expected = rollout_metrics(rollout, one, kl_coef=0.5)
    assert rollout_metrics(wide, other, kl_coef=0.5) == pytest.approx(expected, abs=1e-9)


def moments(rollout) -> tuple[float, float]:
    """Mean and variance of the whitened advantages of the three tokens."""
    active = estimate(rollout, **{**PLAIN, "whiten_advantages": True}).advantages[rollout.mask].double()
    return active.mean().item(), active.var(correction=0).item()


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens(rollout):
    assert moments(rollout) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_whitening_over_padding_as_well_is_caught_by_the_moments_and_by_more_padding(rollout, monkeypatch):
    """It only scales the step, up to a baseline, so the gradient identity cannot catch it."""

    def unmasked(values, mask, **_):
        white = (values - values.mean()) / values.std(correction=0)
        return torch.where(mask, white, 0.0)

    monkeypatch.setattr("rlhf_pipeline.stages.ppo.whiten", unmasked)
    mean, variance = moments(rollout)
    assert abs(mean) > 1e-2 and abs(variance - 1) > 1e-2
    assert abs(moments(padded(rollout))[0] - mean) > 1e-2


def test_a_critic_that_knows_the_returns_explains_everything(rollout):
    known = replace(rollout, values=torch.tensor([[1.85, 2.1], [-0.9, 0.0]]))
    found = rollout_metrics(known, estimate(known, **PLAIN), kl_coef=0.5)
    assert found["val/explained_variance"] == pytest.approx(1.0, abs=1e-9)


def test_sums_over_two_ranks_are_the_whole(rollout):
    def part(row):
        rows = slice(row, row + 1)
        fields = ("mask", "ended", "scores", "logprobs", "ref_logprobs", "values", "entropy")
        return replace(rollout, **{name: getattr(rollout, name)[rows] for name in fields})

    sums = []
    for row in (0, 1):
        mine = part(row)
        rollout_metrics(mine, estimate(mine, **PLAIN), kl_coef=0.5, reduce=lambda s: sums.append(s) or s)
    one = part(0)
    found = rollout_metrics(one, estimate(one, **PLAIN), kl_coef=0.5, reduce=lambda _: sums[0] + sums[1])
    assert found == pytest.approx(rollout_metrics(rollout, estimate(rollout, **PLAIN), kl_coef=0.5), abs=1e-9)


@pytest.mark.parametrize("penalty, expected", [(None, [2.0, -1.0]), (0.0, [2.0, -1.0]), (1.5, [2.0, -2.5])])
def test_the_missing_eos_penalty_is_subtracted_from_cut_responses(rollout, penalty, expected):
    assert apply_missing_eos_penalty(rollout.scores, rollout.ended, penalty).tolist() == expected


def test_scores_are_clipped_before_the_penalty_on_length_and_infinite_ones_stay():
    scores, lengths = torch.tensor([3.0, -1.0, math.inf]), torch.tensor([2, 4, 1])
    assert shape_scores(scores, lengths, clip=2.0, per_token=0.5).tolist() == [1.0, -3.0, math.inf]
    assert shape_scores(scores, lengths, clip=None, per_token=None) is scores
