"""A tree of 31 responses that can be listed, two policies on it, and what is exact about them.

The oracles (next-token distributions by plain forward passes, objective, values) are written down here and use
nothing of the package; the steps (`ppo_steps`, `dpo_gradient`) are the package's own, from the rollout's windows to
the loss terms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.modules import ActorCritic, TokenScores, make_actor_critic
from rlhf_pipeline.rollout.rollout import Estimates, Rollout
from rlhf_pipeline.rollout.sampler import Response
from rlhf_pipeline.stages import ppo
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.ppo_batches import PpoBatch, Scored
from rlhf_pipeline.training.ppo_rollouts import PpoSetup
from rlhf_pipeline.training.windows import Loss, Window

BETA, HORIZON, WORDS, EOS = 0.5, 4, 3, 0
PROMPT = [1, 2]
RESPONSES = [[*s, EOS] for n in range(HORIZON) for s in product((1, 2), repeat=n)]
RESPONSES += [list(s) for s in product((1, 2), repeat=HORIZON)]
ENDED = [ids[-1] == EOS for ids in RESPONSES]
LENGTHS = torch.tensor([len(ids) for ids in RESPONSES])
# The 15 prefixes that have a next token, and the 16 cut responses, where only an EOS put behind them is predicted.
PREFIXES = [s for n in range(HORIZON + 1) for s in product((1, 2), repeat=n)]
INNER = 15
NUMBER = {prefix: number for number, prefix in enumerate(PREFIXES)}
MASK = torch.arange(HORIZON) < LENGTHS[:, None]
NODE = torch.tensor([[NUMBER[tuple(ids[:t])] if t < len(ids) else 0 for t in range(HORIZON)] for ids in RESPONSES])
TOKEN = torch.tensor([ids + [0] * (HORIZON - len(ids)) for ids in RESPONSES])
EXAMPLES = [Example(PROMPT, [ids], [ended], "p", "tree") for ids, ended in zip(RESPONSES, ENDED)]
FREE = ModelShape(0, 0, 0)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REWARD = 2 * numbers(31, seed=10)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Make float64 the type of new tensors: rollouts are kept in the default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def nodes(batch: PackedBatch) -> Tensor:
    """(N,) number of the prefix that each completion token of a batch follows."""
    found: list[int] = []
    prefix: tuple[int, ...] = ()
    for token, offset in zip(batch.target_ids.tolist(), batch.offset.tolist()):
        prefix = prefix if offset else ()
        found.append(NUMBER[prefix])
        prefix = (*prefix, token)
    return torch.tensor(found)


class Table(nn.Module):
    """A policy with logits of its own at each prefix, read through packed batches."""

    reader, actor_frozen = Reader(), False

    def __init__(self, seed: int):
        super().__init__()
        self.logits = nn.Parameter(numbers(len(PREFIXES), WORDS, seed=seed))

    def forward(self, batch: PackedBatch, pretraining: bool = False) -> TokenScores:
        table = torch.log_softmax(self.logits, -1)
        logprobs = table[nodes(batch), batch.target_ids]
        return TokenScores(logprobs, torch.zeros_like(logprobs).detach(), torch.zeros_like(logprobs).detach())


def leaves_of(probabilities: Tensor) -> Table:
    """The table whose responses have these probabilities (31,)."""
    table = Table(0)
    for node, prefix in enumerate(PREFIXES[:INNER]):
        for token in range(WORDS):
            after = (*prefix, token)
            below = [row for row, ids in enumerate(RESPONSES) if tuple(ids[: len(after)]) == after]
            table.logits.data[node, token] = probabilities[below].sum().log()
    return table


def network(seed: int, width: int = 8) -> ActorCritic:
    """A tiny GPT-2 with a critic of its own that says something different at every prefix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": WORDS}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model("gpt2", **sizes, **off, initializer_range=0.5)
    module = make_actor_critic(AutoModelForCausalLM.from_config(config, dtype=torch.float64), Reader(), "sft")
    module.value_head.weight.data = numbers(1, width, seed=seed + 100)
    return module


class WithValues(nn.Module):
    """A policy whose critic is a table of 15 values, one for each prefix."""

    actor_frozen = False

    def __init__(self, policy: nn.Module, values: Tensor):
        super().__init__()
        self.policy, self.values, self.reader = policy, values, policy.reader

    def forward(self, batch: PackedBatch) -> TokenScores:
        return replace(self.policy(batch), values=self.values[nodes(batch)])


@dataclass
class World:
    """A policy and its reference on the tree."""

    policy: nn.Module
    reference: nn.Module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(getattr(self.policy, "actor", self.policy).parameters())

    @staticmethod
    def logprobs(policy: nn.Module) -> Tensor:
        """(31, 4) log-probabilities of the responses' tokens, by plain forward passes over the prefixes."""
        if isinstance(policy, Table):
            table = policy.logits
        else:
            levels = [[PROMPT + list(s) for s in product((1, 2), repeat=n)] for n in range(HORIZON)]
            table = torch.cat([policy.actor(input_ids=torch.tensor(ids)).logits[:, -1] for ids in levels])
        return torch.log_softmax(table, -1)[NODE, TOKEN]

    @classmethod
    def response_logprobs(cls, policy: nn.Module) -> Tensor:
        return torch.where(MASK, cls.logprobs(policy), 0.0).sum(1)

    def probabilities(self) -> Tensor:
        return self.response_logprobs(self.policy).exp().detach()

    def gradient(self, value: Tensor) -> Tensor:
        slopes = torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([slope.flatten() for slope in slopes])

    def objective_gradient(self) -> Tensor:
        """grad of J = sum pi (R - beta log pi / pi_ref), written down directly."""
        logp, ref = self.response_logprobs(self.policy), self.response_logprobs(self.reference).detach()
        return self.gradient((logp.exp() * (REWARD - BETA * (logp - ref))).sum())

    def exact_values(self) -> Tensor:
        """(15,) V^pi of the KL-regularised return, by summing over the responses below each prefix."""
        logprobs, ref = self.logprobs(self.policy).detach(), self.logprobs(self.reference).detach()
        p, spent = self.probabilities(), torch.where(MASK, logprobs - ref, 0.0)
        values = torch.zeros(INNER, dtype=torch.float64)
        for number, prefix in enumerate(PREFIXES[:INNER]):
            depth = len(prefix)
            below = [i for i, ids in enumerate(RESPONSES) if tuple(ids[:depth]) == prefix and len(ids) > depth]
            future = REWARD[below] - BETA * spent[below, depth:].sum(1)
            values[number] = (p[below] * future).sum() / p[below].sum()
        return values


class Reward:
    """The table of rewards as a reward source."""

    label = "tree"

    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        return REWARD[[RESPONSES.index(ids) for example in examples for ids in example.completions]]


class Engine:
    """Stands for an engine that has sampled each of the 31 responses once; logprobs: (31, 4), what it says of them."""

    def __init__(self, logprobs: Tensor):
        self.logprobs = logprobs

    def load_weights(self, policy: nn.Module) -> None:
        pass

    def generate(self, prompts: Sequence[Sequence[int]], **options) -> list[Response]:
        assert [list(prompt) for prompt in prompts] == [PROMPT] * len(RESPONSES)
        rows = zip(RESPONSES, ENDED, self.logprobs.tolist(), strict=True)
        return [Response(list(ids), ended, row[: len(ids)]) for ids, ended, row in rows]


def config_of(responses: int, **changes) -> PpoConfig:
    """The config of one update on so many responses."""
    values = {
        "model_name_or_path": "tree",
        "output_name": "tree",
        "max_steps": 1,
        "max_prompt_length": len(PROMPT),
        "response_length": HORIZON,
        "rollout_batch_size": responses,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "per_device_train_batch_size": 1,
        "kl_coef": BETA,
        "lam": 1.0,
        "whiten_advantages": False,
        "cliprange_value": 1e6,
    }
    return PpoConfig(**{**values, **changes})


def ppo_windows(
    module: nn.Module,
    reference: nn.Module,
    responses: Sequence[Example] = EXAMPLES,
    engine: Engine | None = None,
    stream: Sequence[Example] = (),
    **changes,
) -> list[Window]:
    """The windows of one update of the package's own PPO, had it (or the engine) sampled these responses.

    stream: the examples of the pretraining stream.
    """
    setup = PpoSetup(
        config_of(len(responses), **changes),
        module,
        reference,
        Reward(),
        responses,
        stop_ids=[EOS],
        meter=CostMeter(),
        shapes={"actor": FREE},
        engine=engine,
        stream=stream,
    )
    sampled = mock.patch(
        "rlhf_pipeline.training.ppo_rollouts.sample_for_prompts", lambda *_, **__: (list(responses), [])
    )
    with sampled, float64():
        return list(ppo.ppo_windows(setup, module, 0))


def estimate(rollout: Rollout, **changes) -> Estimates:
    """What the package's own PPO makes of a rollout."""
    seen: list[Estimates] = []
    nothing = SimpleNamespace()
    setup = PpoSetup(config_of(1, **changes), nothing, nothing, nothing, [], EOS, CostMeter(), {})
    steps = {
        "sample_responses": lambda *_: nothing,
        "shuffled_minibatches": lambda *_: [],
        "score_responses": lambda *_: Scored(0, rollout, [], [], 0),
        "check_and_describe": lambda _, __, estimates: seen.append(estimates),
        "minibatch_window": lambda *_: nothing,
    }
    with mock.patch.multiple(ppo, **steps):
        list(ppo.ppo_windows(setup, nothing, 0))
    return seen[0]


def step(module: nn.Module, micro_batch: PpoBatch, **changes) -> Loss:
    """The package's own step on a micro-batch."""
    return ppo.ppo_step(module, micro_batch, config=config_of(1, **changes), meter=CostMeter(), shapes={"actor": FREE})


def expected_step(world: World, module: nn.Module | None = None, sampler: Tensor | None = None, **changes) -> Tensor:
    """sum over y of mu(y) grad S(y), S the policy-loss SUM over y's tokens that the package's step returns.

    Args:
        module: the actor-critic, if not the policy itself. sampler: (31,) mu, if not pi_old. changes: of the settings.
    """
    module = module or world.policy
    p = world.probabilities() if sampler is None else sampler
    total = torch.zeros((), dtype=torch.float64)
    (window,) = ppo_windows(module, world.reference, **changes)
    assert len(window.micro_batches) == len(RESPONSES)
    for micro_batch in window.micro_batches:
        value, _, weight = step(module, micro_batch).terms["loss/policy_avg"]
        total = total + p[RESPONSES.index(micro_batch.batch.target_ids.tolist())] * weight * value
    return world.gradient(total)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
