"""With a frozen policy the critic's fixed point is V^pi, if values are read where the next token is predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.data.batch import PackedBatch, pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.modules import ActorCritic
from tests.rollout.tree import (
    ENDED,
    HORIZON,
    MASK,
    NODE,
    PROMPT,
    RESPONSES,
    World,
    network,
    ppo_windows,
    step,
)

WIDTH = 16  # with the bias 17 features for 15 prefixes: a linear head can take any values on them


@pytest.fixture
def world() -> World:
    torch.set_num_threads(1)
    return World(network(1, WIDTH), network(2, WIDTH))


def read(module: ActorCritic, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """What the value head is given, (N, 17) with the bias's 1, and what it says, (N,)."""
    seen: list[Tensor] = []
    hook = module.value_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    values = module(batch).values.detach()
    hook.remove()
    return torch.cat([seen[0], torch.ones(len(values), 1, dtype=seen[0].dtype)], 1), values


def fit_head(world: World, late: bool = False) -> None:
    """Solve for the value head: least squares on the rollout's returns, responses weighted by pi."""
    module, p = world.policy, world.probabilities()
    (window,) = ppo_windows(module, world.reference)
    features, returns = [], []
    for micro_batch in window.micro_batches:
        batch = micro_batch.batch
        weight = p[RESPONSES.index(batch.target_ids.tolist())].sqrt()
        rows, _ = read(module, replace(batch, predict_index=batch.token_index) if late else batch)
        features.append(weight * rows)
        returns.append(weight * micro_batch.returns[micro_batch.mask])
    solution = torch.linalg.lstsq(torch.cat(features), torch.cat(returns)[:, None], driver="gelsd").solution[:, 0]
    module.value_head.weight.data, module.value_head.bias.data = solution[None, :-1], solution[-1:]


def whole() -> PackedBatch:
    return pack([Example(PROMPT, RESPONSES, ENDED, "p", "tree")])


def test_the_fitted_critic_is_v_pi_at_every_prefix(world):
    fit_head(world)
    batch = whole()
    features, values = read(world.policy, batch)
    found = batch.padded(values, HORIZON)
    torch.testing.assert_close(found[MASK], world.exact_values()[NODE][MASK], rtol=0, atol=1e-8)
    assert torch.linalg.matrix_rank(features) == 15


def test_the_value_loss_of_the_package_is_at_rest_there(world):
    def slope() -> Tensor:
        head, p, total = world.policy.value_head, world.probabilities(), 0.0
        for micro_batch in ppo_windows(world.policy, world.reference)[0].micro_batches:
            weight = p[RESPONSES.index(micro_batch.batch.target_ids.tolist())]
            total = total + weight * step(world.policy, micro_batch).terms["loss/value_avg"][0]
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, [head.weight, head.bias])])

    assert slope().norm() > 1e-2
    fit_head(world)
    assert slope().norm() < 1e-10


def test_values_read_at_the_tokens_cannot_become_v_pi(world):
    fit_head(world, late=True)
    batch = whole()
    _, values = read(world.policy, replace(batch, predict_index=batch.token_index))
    wrong = batch.padded(values, HORIZON)[MASK] - world.exact_values()[NODE][MASK]
    assert wrong.abs().max() > 1e-2
