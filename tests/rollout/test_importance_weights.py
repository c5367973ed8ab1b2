"""Responses that another policy has sampled: importance weights by hand, and the expected weighted step on the tree.

mu is the sampler and pi_old the policy whose gradient is wanted. A weight per token makes mu's choices those of pi_old
and leaves mu's prefixes as they are, so the exact gradient needs the exact V^pi, lambda 0, and the prefixes of pi_old.
"""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.policy import clipped_policy_loss, importance_weights
from rlhf_pipeline.rollout.responses import answered, logprob_matrix
from rlhf_pipeline.rollout.rollout import sampler_metrics
from rlhf_pipeline.rollout.sampler import Response
from tests.rollout.tree import (
    BETA,
    HORIZON,
    INNER,
    MASK,
    NODE,
    RESPONSES,
    REWARD,
    Engine,
    Table,
    WithValues,
    World,
    error,
    expected_step,
    numbers,
    ppo_windows,
    step,
)

UNBOUNDED = math.inf


@pytest.fixture
def tokens():
    """pi_old / mu of three tokens is 2, 3 and 1/2; the fourth is no token."""
    sampler = torch.tensor([[-1.0, -2.0], [-0.5, math.nan]], dtype=torch.float64)
    ratio = torch.tensor([[2.0, 3.0], [0.5, 1.0]], dtype=torch.float64)
    return sampler + ratio.log(), sampler, torch.tensor([[True, True], [True, False]])


def test_weights_by_hand(tokens):
    old, sampler, mask = tokens
    found = importance_weights(old, sampler, mask, cap=2.5)
    torch.testing.assert_close(found.weights, torch.tensor([[2.0, 2.5], [0.5, 1.0]], dtype=torch.float64))
    assert found.truncated.item() == 1
    assert found.difference.item() == pytest.approx(math.log(2) + math.log(3) + math.log(2), abs=1e-12)
    assert importance_weights(old, sampler, mask, cap=UNBOUNDED).weights[0, 1].item() == pytest.approx(3, abs=1e-12)


def test_weights_are_constants(tokens):
    old, sampler, mask = (x.requires_grad_() if x.is_floating_point() else x for x in tokens)
    assert not importance_weights(old, sampler, mask, cap=2.0).weights.requires_grad


def test_figures_by_hand(tokens):
    found = sampler_metrics(tokens[2], importance_weights(*tokens, cap=2.5))
    assert found == pytest.approx(
        {"sampler/logprob_difference": (2 * math.log(2) + math.log(3)) / 3, "sampler/truncated": 1 / 3}, abs=1e-12
    )
    assert sampler_metrics(tokens[2], None) == {}


def test_a_weight_multiplies_its_tokens_loss_and_gradient_and_no_other_figure():
    """Ratio 1.5 and advantage -2: loss 3, slope 3 (tests/algorithms/test_policy.py); with weight .5 both are 1.5."""
    old = torch.tensor([[-1.3, -1.3]], dtype=torch.float64)
    logprobs = (old + math.log(1.5)).requires_grad_()
    advantages, mask = torch.full_like(old, -2.0), torch.tensor([[True, True]])
    weights = torch.tensor([[0.5, 2.0]], dtype=torch.float64).requires_grad_()
    plain = clipped_policy_loss(logprobs, old, advantages, mask, cliprange=0.2)
    found = clipped_policy_loss(logprobs, old, advantages, mask, cliprange=0.2, weights=weights)
    assert (plain.loss.item(), found.loss.item()) == pytest.approx((6.0, 7.5), abs=1e-12)
    slope, of_weights = torch.autograd.grad(found.loss, (logprobs, weights), allow_unused=True)
    torch.testing.assert_close(slope, torch.tensor([[1.5, 6.0]], dtype=torch.float64))
    assert of_weights is None
    for name in ("clipped", "approx_kl", "ratio", "ratio_square"):
        assert getattr(found, name).item() == getattr(plain, name).item()


def test_a_clipped_token_stays_clipped_whatever_its_weight():
    old = torch.full((1, 1), -1.3, dtype=torch.float64)
    logprobs = (old + math.log(1.5)).requires_grad_()
    on = torch.ones(1, 1, dtype=torch.bool)
    found = clipped_policy_loss(logprobs, old, torch.full_like(old, 2.0), on, cliprange=0.2, weights=old.exp())
    assert torch.autograd.grad(found.loss, logprobs)[0].item() == 0
    assert found.clipped.item() == 1


def test_responses_of_an_engine_as_examples():
    from rlhf_pipeline.data.tokenize import Example

    prompts = [Example([1], [[9]], [True], "a", "x"), Example([2], [], [], "b", "x")]
    drawn = [Response([3, 0], True, [-1.0, -2.0]), Response([4], False, [-3.0])]
    sampled, groups = answered(prompts, drawn)
    assert [(e.prompt_ids, e.completions, e.ended) for e in sampled] == [([1], [[3, 0]], [True]), ([2], [[4]], [False])]
    assert groups == [[drawn[0]], [drawn[1]]]
    assert logprob_matrix(drawn, 3).tolist() == [[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]]


def sampler_of(tree: World, places: range) -> torch.Tensor:
    """(31, 4) log-probabilities of a policy that is another one than the tree's at these places of a response."""
    other = World.logprobs(Table(7)).detach()
    own = World.logprobs(tree.policy).detach()
    chosen = torch.tensor([place in places for place in range(HORIZON)])
    return torch.where(chosen, other, own)


def probabilities(logprobs: torch.Tensor) -> torch.Tensor:
    return torch.where(MASK, logprobs, 0.0).sum(1).exp()


def weighted_step(tree: World, mu: torch.Tensor, **changes) -> torch.Tensor:
    module = WithValues(tree.policy, tree.exact_values())
    settings = {"lam": 0.0, "importance_weight_cap": 1e300, **changes}
    return expected_step(tree, module, probabilities(mu), engine=Engine(mu), **settings)


def test_the_samplers_responses_are_whole(tree):
    for places in (range(HORIZON), range(HORIZON - 1, HORIZON)):
        assert probabilities(sampler_of(tree, places)).sum().item() == pytest.approx(1.0, abs=1e-14)


def test_choices_of_another_sampler_after_the_same_prefixes_give_the_exact_gradient(tree):
    """mu differs from pi_old in the last token alone, so that both meet every prefix as often."""
    mu = sampler_of(tree, range(HORIZON - 1, HORIZON))
    exact = -tree.objective_gradient()
    assert error(weighted_step(tree, mu), exact) <= 1e-10
    unweighted = expected_step(tree, WithValues(tree.policy, tree.exact_values()), probabilities(mu), lam=0.0)
    assert error(unweighted, exact) > 1e-2
    assert error(weighted_step(tree, mu, importance_weight_cap=1.2), exact) > 1e-3


def test_another_samplers_prefixes_stay_its_own(tree):
    """sum over prefixes s and tokens a of mu(s) pi(a | s) A(s, a) grad log pi(a | s), written down edge by edge."""
    mu = sampler_of(tree, range(HORIZON))
    logprobs = tree.logprobs(tree.policy)
    log_pi, ref = logprobs.detach(), tree.logprobs(tree.reference).detach()
    values, seen, total = tree.exact_values(), set(), torch.zeros((), dtype=torch.float64)
    for i, ids in enumerate(RESPONSES):
        for t in range(len(ids)):
            if (edge := tuple(ids[: t + 1])) in seen:
                continue
            seen.add(edge)
            last = t + 1 == len(ids)
            after = REWARD[i] if last else values[NODE[i, t + 1]]
            advantage = after - BETA * (log_pi[i, t] - ref[i, t]) - values[NODE[i, t]]
            met = mu[i, :t].sum().exp()
            total = total - met * log_pi[i, t].exp() * advantage * logprobs[i, t]
    assert len(seen) == 3 * INNER
    exact = tree.gradient(total)
    assert error(weighted_step(tree, mu), exact) <= 1e-10
    assert error(exact, -tree.objective_gradient()) > 1e-2


def test_a_sampler_that_agrees_changes_nothing(tree):
    (plain,), (sampled,) = (
        ppo_windows(tree.policy, tree.reference, engine=engine, seed=3)
        for engine in (None, Engine(World.logprobs(tree.policy).detach()))
    )
    for one, other in zip(plain.micro_batches, sampled.micro_batches, strict=True):
        assert one.weights is None
        torch.testing.assert_close(other.weights, torch.ones_like(other.weights), rtol=0, atol=1e-12)
        losses = [step(tree.policy, batch).terms["loss/policy_avg"][0].item() for batch in (one, other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert not any(name.startswith("sampler/") for name in plain.metrics)
    assert sampled.metrics["sampler/logprob_difference"] <= 1e-12
    assert sampled.metrics["sampler/truncated"] == 0


def test_the_advantages_are_of_the_recomputed_log_probabilities(tree):
    """What the sampler says of its tokens moves weights only: ratio, KL and advantages are those of the model."""
    lies = World.logprobs(tree.policy).detach() - numbers(len(RESPONSES), HORIZON, seed=4).abs()
    plain, sampled = (ppo_windows(tree.policy, tree.reference, engine=engine)[0] for engine in (None, Engine(lies)))
    for one, other in zip(plain.micro_batches, sampled.micro_batches, strict=True):
        torch.testing.assert_close(one.old_logprobs, other.old_logprobs, rtol=0, atol=0)
        torch.testing.assert_close(one.advantages, other.advantages, rtol=0, atol=0)
        assert other.weights.max() <= 2.0  # the default cap
    assert {name: value for name, value in sampled.metrics.items() if "sampler" not in name} == plain.metrics
    assert 0 < sampled.metrics["sampler/truncated"] < 1
