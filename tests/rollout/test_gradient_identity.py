"""On a tree that can be listed, the expected policy-gradient step of PPO is the exact gradient of its objective."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import nn

from rlhf_pipeline.algorithms.advantages import gae
from rlhf_pipeline.algorithms.kl import k3
from rlhf_pipeline.algorithms.policy import clipped_policy_loss, clipped_value_loss
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.divergence import divergence
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.roles import Policy
from rlhf_pipeline.rollout.rollout import Rollout, estimate

BETA, HORIZON, WORDS, EOS = 0.5, 4, 3, 0
RESPONSES = [[*s, EOS] for n in range(HORIZON) for s in product((1, 2), repeat=n)]
RESPONSES += [list(s) for s in product((1, 2), repeat=HORIZON)]
PREFIXES = [list(s) for n in range(HORIZON) for s in product((1, 2), repeat=n)]
MASK = torch.tensor([[t < len(ids) for t in range(HORIZON)] for ids in RESPONSES])
NODE = torch.tensor([[PREFIXES.index(ids[:t]) if t < len(ids) else 0 for t in range(HORIZON)] for ids in RESPONSES])


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REWARD = 2 * numbers(31, seed=10)
PLAIN = {"kl_coef": BETA, "gamma": 1.0, "whiten_advantages": False, "whiten_rewards": False}


class Table(nn.Module):
    """A policy with logits of its own at each prefix; gives (31, 4) log-probabilities of the responses' tokens."""

    def __init__(self, seed: int):
        super().__init__()
        self.logits = nn.Parameter(numbers(15, WORDS, seed=seed))

    def forward(self) -> torch.Tensor:
        table = torch.log_softmax(self.logits, -1)
        tokens = torch.tensor([ids + [0] * (HORIZON - len(ids)) for ids in RESPONSES])
        return table[NODE, tokens]


class Network(nn.Module):
    """The same from a tiny GPT-2 through the packed forward pass: one tree of 31 completions."""

    def __init__(self, seed: int):
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        torch.manual_seed(seed)
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": WORDS}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = AutoConfig.for_model("gpt2", **sizes, **off, initializer_range=0.5)
        self.policy = Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float64), Reader())
        ended = [ids[-1] == EOS for ids in RESPONSES]
        self.batch = pack([Example([1, 2], RESPONSES, ended, "p", "tree")], 0)

    def forward(self) -> torch.Tensor:
        return self.batch.padded(self.policy(self.batch).logprobs, HORIZON)


@dataclass
class World:
    """log-probabilities (31, 4) under policy and reference, and the parameters."""

    policy: nn.Module
    ref: torch.Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def response_logprobs(self, logprobs: torch.Tensor) -> torch.Tensor:
        return torch.where(MASK, logprobs, 0.0).sum(1)

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        slopes = torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([slope.flatten() for slope in slopes])

    def objective_gradient(self) -> torch.Tensor:
        """grad of J = sum pi (R - beta log pi / pi_ref), written down directly."""
        logp = self.response_logprobs(self.policy())
        return self.gradient((logp.exp() * (REWARD - BETA * (logp - self.response_logprobs(self.ref)))).sum())

    def exact_values(self) -> torch.Tensor:
        """(31, 4) V^pi(prefix) of the KL-regularised return, by summing over the responses below each prefix."""
        logprobs = self.policy().detach()
        p = self.response_logprobs(logprobs).exp()
        spent = torch.where(MASK, logprobs - self.ref, 0.0)
        values = torch.zeros(15, dtype=torch.float64)
        for number, prefix in enumerate(PREFIXES):
            below = [i for i, ids in enumerate(RESPONSES) if ids[: len(prefix)] == prefix and len(ids) > len(prefix)]
            future = REWARD[below] - BETA * spent[below, len(prefix) :].sum(1)
            values[number] = (p[below] * future).sum() / p[below].sum()
        return values[NODE]

    def rollout(self, values: torch.Tensor, scores: torch.Tensor = REWARD) -> Rollout:
        logprobs = self.policy().detach()
        return Rollout([], MASK, MASK.any(1), scores, logprobs, self.ref, values, torch.zeros_like(logprobs))

    def expected_step(self, advantages: torch.Tensor) -> torch.Tensor:
        """sum over y of pi_old(y) grad S(y), S the loss SUM of y's tokens."""
        logprobs = self.policy()
        old = logprobs.detach()
        weights = self.response_logprobs(old).exp()
        rows = zip(*(matrix.split(1) for matrix in (logprobs, old, advantages, MASK)))
        losses = [clipped_policy_loss(*row, cliprange=0.2).loss for row in rows]
        return self.gradient((weights * torch.stack(losses)).sum())


@pytest.fixture(scope="module", params=[Table, Network], ids=["table", "network"])
def tree(request) -> World:
    torch.set_num_threads(1)
    return World(request.param(1), request.param(2)().detach())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def advantages(rollout: Rollout, lam: float) -> torch.Tensor:
    return estimate(rollout, lam=lam, **PLAIN).advantages


def test_the_tree_is_whole(tree):
    assert len(RESPONSES) == 31
    assert tree.response_logprobs(tree.policy()).exp().sum().item() == pytest.approx(1.0, abs=1e-14)


def test_with_lambda_1_any_value_function_gives_the_exact_gradient(tree):
    for seed in (20, 21):
        rollout = tree.rollout(5 * numbers(15, seed=seed)[NODE])
        assert error(tree.expected_step(advantages(rollout, 1.0)), -tree.objective_gradient()) <= 1e-10


@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0])
def test_with_exact_values_every_lambda_gives_the_exact_gradient(tree, lam):
    rollout = tree.rollout(tree.exact_values())
    assert error(tree.expected_step(advantages(rollout, lam)), -tree.objective_gradient()) <= 1e-10


def test_a_smaller_lambda_with_wrong_values_is_biased(tree):
    rollout = tree.rollout(numbers(15, seed=20)[NODE])
    assert error(tree.expected_step(advantages(rollout, 0.5)), -tree.objective_gradient()) > 1e-2


def test_whitening_changes_the_step_by_a_factor_and_a_baseline_only(tree):
    rollout = tree.rollout(tree.exact_values())
    plain = advantages(rollout, 1.0)[MASK]
    white = estimate(rollout, lam=1.0, **{**PLAIN, "whiten_advantages": True}).advantages
    mean, var = plain.mean(), plain.var(correction=0)
    torch.testing.assert_close(white[MASK], (plain - mean) / (var + 1e-8).sqrt(), rtol=0, atol=1e-12)
    # A constant has gradient 0 under the policy: only the factor is left.
    assert error(tree.expected_step(white), -tree.objective_gradient() / (var + 1e-8).sqrt()) <= 1e-10


def test_known_mistakes_break_the_identity(tree):
    exact = -tree.objective_gradient()
    rollout = tree.rollout(tree.exact_values())
    none = estimate(tree.rollout(rollout.values, torch.zeros_like(REWARD)), lam=1.0, **PLAIN).rewards
    last = MASK.sum(1) - 1

    def step(rewards: torch.Tensor) -> torch.Tensor:
        return tree.expected_step(gae(rewards, rollout.values, MASK, gamma=1.0, lam=1.0)[0])

    right = none.scatter_add(1, last[:, None], REWARD[:, None])
    assert error(step(right), exact) <= 1e-10
    early = none.scatter_add(1, (last - 1).clamp_min(0)[:, None], REWARD[:, None])
    first = none.scatter_add(1, torch.zeros_like(last)[:, None], REWARD[:, None])
    in_k3 = torch.where(MASK, -BETA * k3(rollout.logprobs, rollout.ref_logprobs), 0.0)
    in_k3 = in_k3.scatter_add(1, last[:, None], REWARD[:, None])
    sign = (-none).scatter_add(1, last[:, None], REWARD[:, None])
    for wrong in (early, in_k3, sign):
        assert error(step(wrong), exact) > 1e-2
    assert error(step(first), exact) > 1e-2  # later tokens no longer see the score


def test_the_value_loss_is_at_rest_at_the_exact_values(tree):
    rollout = tree.rollout(torch.zeros(31, 4, dtype=torch.float64))
    returns = estimate(rollout, lam=1.0, **PLAIN).returns
    weights = tree.response_logprobs(rollout.logprobs).exp()
    exact = torch.zeros(15, dtype=torch.float64)
    exact[NODE[MASK]] = tree.exact_values()[MASK]

    def slope(table: torch.Tensor) -> torch.Tensor:
        table = table.clone().requires_grad_()
        values = table[NODE]
        rows = zip(*(matrix.split(1) for matrix in (values, values.detach(), returns, MASK)))
        losses = [clipped_value_loss(*row, cliprange_value=0.2)[0] for row in rows]
        return torch.autograd.grad((weights * torch.stack(losses)).sum(), table)[0]

    assert slope(exact).abs().max().item() < 1e-13
    assert slope(exact + 0.1).min().item() > 1e-4


def test_reported_kl_figures_have_the_enumerated_mean(tree):
    logprobs = tree.policy().detach()
    p = tree.response_logprobs(logprobs).exp()
    kl = (p * (tree.response_logprobs(logprobs) - tree.response_logprobs(tree.ref))).sum().item()
    per_token_k3 = torch.where(MASK, k3(logprobs, tree.ref), 0.0).sum(1)
    assert (p * per_token_k3).sum().item() == pytest.approx(kl, abs=1e-12)
    if isinstance(tree.policy, Network):
        found = divergence(tree.policy.policy, Network(2).policy, tree.policy.batch)
        per_response = tree.policy.batch.per_completion(found.kl)
        assert (p * per_response).sum().item() == pytest.approx(kl, abs=1e-12)
