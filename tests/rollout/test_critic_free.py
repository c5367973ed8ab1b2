"""RLOO, GRPO and A2C on the tree of 31 responses: their expected steps, and where these come to rest.

RLOO and GRPO compare the responses to one prompt; all 961 pairs of responses are listed, with their probabilities. The
package makes the advantages of the pairs and the losses of the responses; what they should be is written down here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.models.modules import TokenScores
from rlhf_pipeline.rollout.rollout import Rollout
from tests.rollout.tree import (
    BETA,
    ENDED,
    HORIZON,
    INNER,
    LENGTHS,
    MASK,
    NUMBER,
    PREFIXES,
    PROMPT,
    RESPONSES,
    REWARD,
    WORDS,
    Table,
    World,
    error,
    estimate,
    expected_step,
    network,
    nodes,
    ppo_windows,
    step,
)

LEAF = {tuple(ids): number for number, ids in enumerate(RESPONSES)}
RLOO, GRPO = {"algorithm": "rloo"}, {"algorithm": "grpo"}
PER_TOKEN = {**GRPO, "kl_in": "loss"}
PUBLISHED = {**PER_TOKEN, "scale_rewards": "group", "loss_normalization": "responses"}


def pairs(world: World) -> Rollout:
    """All pairs of responses, as groups of two."""
    first, second = torch.arange(31).repeat_interleave(31), torch.arange(31).repeat(31)
    rows = torch.stack([first, second], 1).flatten()
    logprobs, ref = (world.logprobs(policy).detach()[rows] for policy in (world.policy, world.reference))
    return Rollout(
        examples=[],
        mask=MASK[rows],
        ended=torch.tensor(ENDED)[rows],
        scores=REWARD[rows],
        logprobs=logprobs,
        ref_logprobs=ref,
        values=None,
        entropy=torch.zeros_like(logprobs),
    )


def mean_advantages(world: World, **changes) -> Tensor:
    """(31, 4) mean advantage of each response over the other response of its pair."""
    found = estimate(pairs(world), num_generations=2, **changes).advantages.view(31, 31, 2, HORIZON)[:, :, 0]
    return torch.einsum("j,ijt->it", world.probabilities(), found)


def pair_step(world: World, **changes) -> Tensor:
    """The expected gradient of the package's loss SUM over a response, over all pairs."""
    advantages, p = mean_advantages(world, **changes), world.probabilities()
    total = torch.zeros((), dtype=torch.float64)
    (window,) = ppo_windows(world.policy, world.reference, num_generations=31, **changes)
    for micro_batch in window.micro_batches:
        row = RESPONSES.index(micro_batch.batch.target_ids.tolist())
        loss = step(world.policy, replace(micro_batch, advantages=advantages[row : row + 1]), **changes)
        total = total + p[row] * sum(weight * value for value, _, weight in loss.terms.values())
    return world.gradient(total)


def conditional(table: Table) -> Tensor:
    """(15, 3) next-token probabilities at the prefixes that have a next token."""
    return torch.softmax(table.logits.detach(), -1)[:INNER]


def table_of(probabilities: Tensor) -> Table:
    table = Table(0)
    table.logits.data[:INNER] = probabilities.log()
    return table


def backward(policy: Tensor, leaves: Tensor) -> Tensor:
    """(15, 3) mean under the policy of a value of whole responses (31,), behind each prefix and next token."""
    q = torch.zeros(INNER, WORDS, dtype=torch.float64)
    for node in reversed(range(INNER)):
        for token in range(WORDS):
            after = (*PREFIXES[node], token)
            below = NUMBER.get(after)
            q[node, token] = leaves[LEAF[after]] if after in LEAF else (policy[below] * q[below]).sum()
    return q


def optimum(ref: Tensor, reward: Tensor = REWARD) -> Table:
    """pi* = ref exp(R / beta) / Z, by soft values from the leaves on."""
    policy, z = torch.zeros_like(ref), torch.zeros(INNER, dtype=torch.float64)
    for node in reversed(range(INNER)):
        after = [(*PREFIXES[node], token) for token in range(WORDS)]
        weight = torch.stack([(reward[LEAF[s]] / BETA).exp() if s in LEAF else z[NUMBER[s]] for s in after])
        z[node] = (ref[node] * weight).sum()
        policy[node] = ref[node] * weight / z[node]
    return table_of(policy)


def per_token_optimum(ref: Tensor, gain: float) -> Table:
    """Fixed point of k3 per token in the loss: pi = beta ref / (lambda - a Q), lambda by sum 1, V = sum pi Q."""
    policy, q, v = torch.zeros_like(ref), torch.zeros_like(ref), torch.zeros(INNER, dtype=torch.float64)
    for node in reversed(range(INNER)):
        after = [(*PREFIXES[node], token) for token in range(WORDS)]
        q[node] = torch.stack([REWARD[LEAF[s]] if s in LEAF else v[NUMBER[s]] for s in after])
        low, high = gain * q[node].max(), gain * q[node].max() + BETA
        for _ in range(200):
            middle = (low + high) / 2
            above = (BETA * ref[node] / (middle - gain * q[node])).sum() > 1
            low, high = (middle, high) if above else (low, middle)
        policy[node] = BETA * ref[node] / (high - gain * q[node])
        policy[node] /= policy[node].sum()
        v[node] = (policy[node] * q[node]).sum()
    return table_of(policy)


@pytest.fixture(scope="module")
def reference() -> Table:
    return Table(2)


def at_reference(reference: Table, **changes) -> float:
    """The size of the expected step where training begins."""
    return pair_step(World(table_of(conditional(reference)), reference), **changes).norm().item()


def test_the_baseline_of_rloo_is_unbiased(tree):
    """Over all pairs of responses the expected step is the exact gradient of J = E[R - beta log pi / ref]."""
    assert error(pair_step(tree, **RLOO), -tree.objective_gradient()) <= 1e-10


def test_the_kl_of_a_response_in_the_loss_of_rloo_is_unbiased_too(tree):
    """The square of a response's log-ratio, halved, has the gradient of the KL; advantages are those of scores."""
    changes = {**RLOO, "kl_in": "response_loss"}
    assert error(pair_step(tree, **changes), -tree.objective_gradient()) <= 1e-10


def test_the_mean_of_the_group_shrinks_the_step_of_grpo(tree):
    """The response is in its own baseline, so two responses make half the step, in the same direction."""
    assert error(pair_step(tree, **GRPO), -tree.objective_gradient() / 2) <= 1e-10


@pytest.mark.parametrize(
    "changes",
    [
        RLOO,
        GRPO,
        {**GRPO, "scale_rewards": "group"},
        {**GRPO, "loss_normalization": "responses"},
        {**GRPO, "scale_rewards": "group", "loss_normalization": "responses"},
    ],
)
def test_with_the_kl_in_the_return_nothing_moves_the_optimum(reference, changes):
    world = World(optimum(conditional(reference)), reference)
    size = at_reference(reference, **changes)
    assert size > 1e-2
    assert pair_step(world, **changes).norm().item() <= 1e-9 * size


def test_the_kl_of_tokens_in_the_loss_has_another_fixed_point_which_depends_on_the_size_of_a_group(reference):
    """Groups of two act like a gain of 1/2 on the reward."""
    size = at_reference(reference, **PER_TOKEN)
    there = World(per_token_optimum(conditional(reference), 0.5), reference)
    assert pair_step(there, **PER_TOKEN).norm().item() <= 1e-9 * size
    for policy in (optimum(conditional(reference)), per_token_optimum(conditional(reference), 1.0)):
        assert pair_step(World(policy, reference), **PER_TOKEN).norm().item() > 1e-2 * size


def scaled() -> Tensor:
    """(31, 31) advantage of the first response of a pair, divided by the pair's standard deviation."""
    difference = REWARD[:, None] - REWARD
    return difference / 2 / (difference.abs() / 2**0.5 + 1e-4)


@pytest.mark.parametrize("per_response", [False, True])
def test_the_published_grpo_rests_where_its_reference_says(per_response):
    """From a policy follows the reference for which it is the fixed point.

    With C = E[A w], W = E[w] behind a prefix and token, w = 1 or 1 / |y|: ref = pi (lambda + beta W - C) / (beta W).
    """
    beta, policy = 2.0, conditional(Table(1))
    p = World(table_of(policy), Table(2)).probabilities()
    share = LENGTHS.double().reciprocal() if per_response else torch.ones(31, dtype=torch.float64)
    gain, weight = backward(policy, (scaled() @ p) * share), backward(policy, share)
    offset = (policy * gain / weight).sum(1, keepdim=True) / (policy / weight).sum(1, keepdim=True)
    ref = policy * (offset + beta * weight - gain) / (beta * weight)
    assert ref.min() > 0
    torch.testing.assert_close(ref.sum(1), torch.ones(INNER, dtype=torch.float64), rtol=0, atol=1e-12)
    changes = {**PUBLISHED, "kl_coef": beta, "loss_normalization": "responses" if per_response else "tokens"}
    world = World(table_of(policy), table_of(ref))
    assert pair_step(world, **changes).norm().item() <= 1e-10
    other = {**changes, "loss_normalization": "tokens" if per_response else "responses"}
    assert pair_step(world, **other).norm().item() > 1e-3
    assert pair_step(world, **{**changes, "scale_rewards": "none"}).norm().item() > 1e-3


@pytest.mark.parametrize("per", ["tokens", "sequences", "responses"])
def test_what_a_window_is_divided_by(tree, per):
    """The 31 responses as one group: minus the mean of A log pi, over tokens, over a constant or over responses."""
    changes = {**GRPO, "loss_normalization": per, "num_generations": 31}
    (window,) = ppo_windows(tree.policy, tree.reference, **changes)
    losses = [step(tree.policy, one, **changes).total(window.counts) for one in window.micro_batches]
    logprobs, ref = tree.response_logprobs(tree.policy), tree.response_logprobs(tree.reference).detach()
    returns = (REWARD - BETA * (logprobs - ref)).detach()
    divisor = {"tokens": LENGTHS.sum(), "sequences": torch.tensor(31 * HORIZON), "responses": 31 * LENGTHS}[per]
    expected = -((returns - returns.mean()) * logprobs / divisor).sum()
    assert error(tree.gradient(sum(losses)), tree.gradient(expected)) <= 1e-10


def test_whitened_advantages_are_those_of_responses(reference):
    """Mean 0 (which that of the others has) and variance 1 over responses, whatever their lengths."""
    world = World(Table(1), reference)
    plain, white = (estimate(pairs(world), num_generations=2, whiten_advantages=on, **RLOO) for on in (False, True))
    values = plain.advantages[:, 0]
    deviation = (values**2).mean().sqrt()
    torch.testing.assert_close(white.advantages, plain.advantages / deviation, rtol=0, atol=1e-7)


def window_gradient(module: torch.nn.Module, reference: torch.nn.Module, **changes) -> Tensor:
    """The gradient of actor and critic in the first window of an update."""
    window = ppo_windows(module, reference, **changes)[0]
    loss = sum(step(module, one, **changes).total(window.counts) for one in window.micro_batches)
    parameters = list(module.parameters())
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, parameters)])


def test_a2c_takes_the_first_step_of_ppo():
    module, other = network(1), network(2)
    defaults = {"lam": 0.95, "whiten_advantages": True}
    ppo = window_gradient(module, other, cliprange=0.2, cliprange_value=0.2, **defaults)
    a2c = window_gradient(module, other, algorithm="a2c", cliprange=None, cliprange_value=None, **defaults)
    assert ppo.norm() > 1e-2
    assert error(a2c, ppo) <= 1e-10


def test_a2c_clips_nothing():
    """At ratios of e and 1 / e PPO's gradient of some tokens is 0; that of A2C is the gradient of -A ratio of all."""
    world = World(Table(1), Table(2))
    changes = {"algorithm": "a2c", "cliprange": None, "cliprange_value": None}
    (window,) = ppo_windows(world.policy, world.reference, **changes)
    for shift in (1.0, -1.0):
        for one in window.micro_batches:
            moved = replace(one, old_logprobs=one.old_logprobs - shift)
            value, _, _ = step(world.policy, moved, **changes).terms["loss/policy_avg"]
            row = RESPONSES.index(one.batch.target_ids.tolist())
            logprobs = world.logprobs(world.policy)[row][: LENGTHS[row]]
            expected = -(one.advantages[0, : LENGTHS[row]] * (logprobs - logprobs.detach() + shift).exp()).sum()
            assert error(world.gradient(value), world.gradient(expected)) <= 1e-10


@pytest.mark.parametrize(
    ("changes", "reward"),
    [
        ({"length_penalty": 0.3}, REWARD - 0.3 * LENGTHS.double()),
        ({"reward_clip": 1.0}, REWARD.clamp(-1, 1)),
        ({"reward_clip": 1.0, "length_penalty": 0.3}, REWARD.clamp(-1, 1) - 0.3 * LENGTHS.double()),
    ],
)
def test_a_shaped_score_has_its_own_optimum(reference, changes, reward):
    """ref exp(R' / beta) / Z of the shaped score R', and not pi*; with V = 0, which lambda 1 allows."""
    size = expected_step(World(table_of(conditional(reference)), reference)).norm().item()
    there = World(optimum(conditional(reference), reward), reference)
    assert expected_step(there, **changes).norm().item() <= 1e-10 * size
    assert expected_step(World(optimum(conditional(reference)), reference), **changes).norm().item() > 1e-2 * size


class WithEntropy(Table):
    """A table that trains the entropy of its distributions."""

    def forward(self, batch: PackedBatch) -> TokenScores:
        table = torch.log_softmax(self.logits, -1)[nodes(batch)]
        return replace(super().forward(batch), entropy=-(table.exp() * table).sum(-1))


def entropy_optimum(ref: Tensor, bonus: float) -> Table:
    """pi ~ ref^(b / (b + c)) exp(Q / (b + c)), with V = sum pi (Q - b log pi / ref): without the bonus."""
    policy, v, both = torch.zeros_like(ref), torch.zeros(INNER, dtype=torch.float64), BETA + bonus
    for node in reversed(range(INNER)):
        after = [(*PREFIXES[node], token) for token in range(WORDS)]
        q = torch.stack([REWARD[LEAF[s]] if s in LEAF else v[NUMBER[s]] for s in after])
        policy[node] = torch.softmax((BETA * ref[node].log() + q) / both, 0)
        v[node] = (policy[node] * (q - BETA * (policy[node] / ref[node]).log())).sum()
    table = WithEntropy(0)
    table.logits.data[:INNER] = policy.log()
    return table


def test_an_entropy_bonus_has_its_own_fixed_point(reference):
    changes = {**RLOO, "entropy_coef": 0.2}
    start = WithEntropy(0)
    start.logits.data = reference.logits.detach().clone()
    size = pair_step(World(start, reference), **changes).norm().item()
    there = entropy_optimum(conditional(reference), 0.2)
    assert pair_step(World(there, reference), **changes).norm().item() <= 1e-9 * size
    best = entropy_optimum(conditional(reference), 0.0)
    assert pair_step(World(best, reference), **changes).norm().item() > 1e-2 * size
    assert pair_step(World(best, reference), **RLOO).norm().item() <= 1e-9 * size


def test_the_bonus_of_the_package_is_the_gradient_of_the_entropy():
    """A tiny GPT-2: the gradient of the loss is -c times that of the mean entropy of the tokens' distributions."""
    module, other = network(1), network(2)
    plain, with_bonus = (window_gradient(module, other, entropy_coef=c, vf_coef=0.0) for c in (0.0, 0.3))
    module.trains_entropy = True
    assert error(window_gradient(module, other, entropy_coef=0.0, vf_coef=0.0), plain) <= 1e-12
    trained = window_gradient(module, other, entropy_coef=0.3, vf_coef=0.0)
    assert torch.equal(with_bonus, plain)  # detached: what is reported has no gradient
    levels = [torch.tensor([PROMPT + ids[:t] for ids in RESPONSES if len(ids) > t]) for t in range(HORIZON)]
    table = torch.cat([torch.log_softmax(module.actor(input_ids=ids).logits[:, -1], -1) for ids in levels])
    entropy = -(table.exp() * table).sum(-1).mean()
    slopes = torch.autograd.grad(entropy, list(module.parameters()), allow_unused=True, materialize_grads=True)
    expected = -0.3 * torch.cat([slope.flatten() for slope in slopes])
    assert error(trained - plain, expected) <= 1e-10
