"""On a tree that can be listed, the expected policy-gradient step of PPO is the exact gradient of its objective.

sum over y of pi_old(y) grad S(y) = -grad J at ratio 1, S(y) the package's policy-loss SUM over y's tokens and
J = sum pi (R - beta log pi / pi_ref); with gamma 1, no whitening, and either lambda 1 or the exact V^pi.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from rlhf_pipeline.algorithms.kl import k3
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.sampled import divergence
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.modules import ActorCritic, Policy
from rlhf_pipeline.training.loop import fit
from tests.rollout.tree import (
    BETA,
    ENDED,
    EXAMPLES,
    HORIZON,
    LENGTHS,
    MASK,
    NODE,
    PROMPT,
    RESPONSES,
    REWARD,
    Table,
    WithValues,
    World,
    error,
    expected_step,
    numbers,
    ppo_windows,
    step,
)

WHOLE = Example(PROMPT, RESPONSES, ENDED, "p", "tree")


def test_the_tree_is_whole(tree):
    assert len(RESPONSES) == 31
    assert tree.probabilities().sum().item() == pytest.approx(1.0, abs=1e-14)


def test_the_packed_forward_pass_gives_the_probabilities_of_plain_ones(tree):
    batch = pack([WHOLE])
    found = batch.per_completion(tree.policy(batch).logprobs)
    torch.testing.assert_close(found, tree.response_logprobs(tree.policy), rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", [20, 21])
def test_with_lambda_1_any_value_function_gives_the_exact_gradient(tree, seed):
    module = WithValues(tree.policy, 5 * numbers(15, seed=seed))
    assert error(expected_step(tree, module), -tree.objective_gradient()) <= 1e-10


def test_with_lambda_1_the_critic_of_the_package_gives_the_exact_gradient(tree):
    """Its values differ from prefix to prefix and not by the token that follows, or they would bias the step."""
    if isinstance(tree.policy, ActorCritic):
        values = tree.policy(pack([WHOLE])).values
        assert values.std() > 0.1
    assert error(expected_step(tree), -tree.objective_gradient()) <= 1e-10


@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0])
def test_with_exact_values_every_lambda_gives_the_exact_gradient(tree, lam):
    module = WithValues(tree.policy, tree.exact_values())
    assert error(expected_step(tree, module, lam=lam), -tree.objective_gradient()) <= 1e-10


def test_a_smaller_lambda_with_wrong_values_is_biased(tree):
    module = WithValues(tree.policy, numbers(15, seed=20))
    assert error(expected_step(tree, module, lam=0.5), -tree.objective_gradient()) > 1e-2


def test_the_value_loss_is_at_rest_at_the_exact_values(tree):
    p, exact = tree.probabilities(), tree.exact_values()

    def slope(values: torch.Tensor) -> torch.Tensor:
        module = WithValues(tree.policy, values.clone().requires_grad_())
        total = 0.0
        for window in ppo_windows(module, tree.reference):
            for micro_batch in window.micro_batches:
                weight = p[RESPONSES.index(micro_batch.batch.target_ids.tolist())]
                total = total + weight * step(module, micro_batch).terms["loss/value_avg"][0]
        return torch.autograd.grad(total, module.values)[0]

    assert slope(exact).abs().max().item() < 1e-13
    assert slope(exact + 0.1).min().item() > 1e-4


def test_reported_kl_figures_have_the_enumerated_mean(tree):
    logprobs, ref = (tree.logprobs(policy).detach() for policy in (tree.policy, tree.reference))
    p = tree.probabilities()
    kl = (p * torch.where(MASK, logprobs - ref, 0.0).sum(1)).sum().item()
    per_token_k3 = torch.where(MASK, k3(logprobs, ref), 0.0).sum(1)
    assert (p * per_token_k3).sum().item() == pytest.approx(kl, abs=1e-12)
    if isinstance(tree.policy, ActorCritic):
        policies = [Policy(module.actor, Reader()) for module in (tree.policy, tree.reference)]
        batch = pack([WHOLE])
        per_response = batch.per_completion(divergence(*policies, batch).kl)
        assert (p * per_response).sum().item() == pytest.approx(kl, abs=1e-12)


@pytest.fixture(scope="module")
def quarters() -> World:
    """A policy whose next-token probabilities are 1/4, 1/4 and 1/2: 256 responses are its whole population."""
    policy = Table(1)
    order = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(n)) for n in range(31)])
    policy.logits.data = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)[order].log()
    return World(policy, Table(2))


def population(world: World) -> list[Example]:
    counts = (world.probabilities() * 256).round().int().tolist()
    assert sum(counts) == 256 and min(counts) >= 1
    return [example for example, count in zip(EXAMPLES, counts) for _ in range(count)]


def applied_gradient(world: World, module: nn.Module, *, loss_normalization: str = "tokens", **changes) -> torch.Tensor:
    """The gradient that the package's loop leaves after one window over the whole population."""
    windows = ppo_windows(module, world.reference, population(world), per_device_train_batch_size=37, **changes)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    steps = fit(
        module,
        windows,
        lambda model, micro_batch: step(model, micro_batch, loss_normalization=loss_normalization),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        accelerator=Accelerator(cpu=True),
        max_grad_norm=0.0,
        on_update=lambda *_: None,
    )
    assert steps == 1
    return torch.cat([parameter.grad.flatten() for parameter in world.parameters])


def test_the_mean_over_tokens_is_the_gradient_over_the_expected_length(quarters):
    expected_length = (quarters.probabilities() * LENGTHS).sum()
    found = applied_gradient(quarters, WithValues(quarters.policy, numbers(15, seed=20)))
    assert error(found, -quarters.objective_gradient() / expected_length) <= 1e-10


def test_the_mean_over_sequences_is_the_gradient_over_a_constant(quarters):
    module = WithValues(quarters.policy, numbers(15, seed=20))
    found = applied_gradient(quarters, module, loss_normalization="sequences")
    assert error(found, -quarters.objective_gradient() / HORIZON) <= 1e-10


def test_whitened_advantages_scale_the_step_by_1_over_their_deviation(quarters):
    values = 3 * numbers(15, seed=20) + 2
    # A = G - V of every token, weighted by the probability of its response; a constant has gradient 0.
    logprobs, ref = (quarters.logprobs(policy).detach() for policy in (quarters.policy, quarters.reference))
    spent = torch.where(MASK, BETA * (logprobs - ref), 0.0)
    advantages = (REWARD[:, None] - spent.flip(1).cumsum(1).flip(1) - values[NODE])[MASK]
    weight = quarters.probabilities()[:, None].expand(-1, HORIZON)[MASK]
    mean = (weight * advantages).sum() / weight.sum()
    deviation = ((weight * (advantages - mean) ** 2).sum() / weight.sum() + 1e-8).sqrt()
    assert abs(mean) > 0.1 and deviation > 1.1
    found = applied_gradient(quarters, WithValues(quarters.policy, values), whiten_advantages=True)
    expected_length = (quarters.probabilities() * LENGTHS).sum()
    assert error(found, -quarters.objective_gradient() / (deviation * expected_length)) <= 1e-10
