"""PPO-ptx: the gradient of a step, its fixed point on the tree of 31 responses, and the order of the stream."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from scipy.special import lambertw
from torch import Tensor, nn

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.training.cost import CostMeter
from rlhf_pipeline.training.ppo_rollouts import PpoSetup
from rlhf_pipeline.training.ptx import stream_windows
from rlhf_pipeline.training.windows import ExampleBatch, Window
from tests.rollout.tree import (
    BETA,
    EOS,
    EXAMPLES,
    FREE,
    HORIZON,
    LENGTHS,
    MASK,
    RESPONSES,
    REWARD,
    Reward,
    Table,
    World,
    config_of,
    error,
    leaves_of,
    network,
    ppo_windows,
    step,
)

GAMMA = 0.7
ROWS = [3, 7, 7, 20, 30]
STREAM = [EXAMPLES[row] for row in ROWS]
FAMILY = {
    "ppo": {"lam": 0.95, "whiten_advantages": True, "temperature": 0.7},
    "a2c": {"algorithm": "a2c", "cliprange": None, "cliprange_value": None},
    "rloo": {"algorithm": "rloo", "num_generations": 31},
    "grpo": {"algorithm": "grpo", "num_generations": 31, "kl_in": "loss", "loss_normalization": "responses"},
}


def gradient(module: nn.Module, reference: nn.Module, stream: list[Example], **changes) -> Tensor:
    """The gradient of actor and critic in the first window of an update."""
    module.temperature = changes.get("temperature", 1.0)
    window = ppo_windows(module, reference, stream=stream, **changes)[0]
    loss = sum(step(module, one, **changes).total(window.counts) for one in window.micro_batches)
    slopes = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize("name", FAMILY)
def test_the_gradient_is_that_of_ppo_plus_gamma_times_that_of_sft(name):
    """Whatever the temperature of the rollouts, the stream is read as it is; its mean is over its own tokens."""
    module, other = network(1), network(2)
    ppo = gradient(module, other, [], **FAMILY[name])
    both = gradient(module, other, STREAM, ptx_coef=GAMMA, **FAMILY[name])
    rows = torch.where(MASK, World.logprobs(module), 0.0)[ROWS]
    nll = -rows.sum() / LENGTHS[ROWS].sum()
    slopes = torch.autograd.grad(nll, list(module.parameters()), allow_unused=True, materialize_grads=True)
    sft = torch.cat([slope.flatten() for slope in slopes])
    assert ppo.norm() > 1e-3 and sft.norm() > 1e-2
    assert error(both, ppo + GAMMA * sft) <= 1e-10


def expected(world: World, coef: float, stream: list[Example]) -> Tensor:
    """The expected gradient of a step whose loss is divided by sequences x HORIZON, under the policy's own samples."""
    changes = {"loss_normalization": "sequences", "ptx_coef": coef, "ptx_batch_size": len(stream) or None}
    (window,) = ppo_windows(world.policy, world.reference, stream=stream, **changes)
    p, total = world.probabilities(), torch.zeros((), dtype=torch.float64)
    for one in window.micro_batches:
        loss = step(world.policy, one, **changes)
        if isinstance(one, ExampleBatch):
            total = total + loss.total(window.counts)
        else:
            value, _, weight = loss.terms["loss/policy_avg"]
            total = total + p[RESPONSES.index(one.batch.target_ids.tolist())] * weight * value / HORIZON
    return world.gradient(total)


def test_the_fixed_point_on_the_prompts_of_the_stream():
    """R - beta log(pi / ref) + gamma D / pi = l: pi = gamma D / (beta W(gamma D / (beta ref e^((R - l) / beta)))).

    D is the law of the stream, and gamma = ptx_coef x HORIZON / (mean tokens of its examples) in units of reward.
    """
    reference, gamma = Table(2), 0.3
    world = World(reference, reference)
    ref = world.probabilities()
    times = torch.tensor([row % 4 for row in range(31)])  # some responses are not in the stream
    stream = [example for example, count in zip(EXAMPLES, times.tolist()) for _ in range(count)]
    law = times.double() / times.sum()

    def at(level: float) -> Tensor:
        tilted = ref * ((REWARD - level) / BETA).exp()
        share = gamma * law / BETA
        inner = torch.from_numpy(lambertw((share / tilted).numpy()).real)
        return torch.where(law > 0, share / inner.clamp_min(1e-300), tilted)

    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > 1 else (low, middle)
    there = World(leaves_of(at(low)), reference)
    coef = gamma * float((law * LENGTHS).sum()) / HORIZON
    size = expected(world, coef, stream).norm()
    assert size > 1e-3
    assert expected(there, coef, stream).norm() <= 1e-9 * size
    star = ref * (REWARD / BETA).exp()
    best = World(leaves_of(star / star.sum()), reference)
    assert expected(best, coef, stream).norm() > 1e-2 * size
    assert expected(best, 0.0, []).norm() <= 1e-9 * size


def setup_of(rank: int = 0, world_size: int = 1, **changes) -> PpoSetup:
    """A run of 4 updates of 2 x 2 steps, with 7 examples and 3 of them in a step."""
    sizes = {"num_ppo_epochs": 2, "num_mini_batches": 2, "per_device_train_batch_size": 2, "max_steps": 4}
    config = config_of(8, ptx_coef=GAMMA, ptx_batch_size=3, **sizes, **changes)
    stream = [replace(EXAMPLES[row], where=str(row)) for row in range(7)]
    more = {"stop_ids": [EOS], "meter": CostMeter(), "shapes": {"actor": FREE}}
    found = PpoSetup(config, network(1), network(2), Reward(), EXAMPLES, stream=stream, **more)
    found.rank, found.world_size = rank, world_size
    return found


def names(window: Window) -> list[str]:
    """The examples of a window's micro-batches, with a mark where one begins."""
    return [text for one in window.micro_batches for text in ("|", *(example.where for example in one.examples))]


def test_a_resumed_run_goes_on_where_the_stream_was():
    whole = list(stream_windows(setup_of(), 0))
    assert len(whole) == 4 * 2 * 2
    for start in (1, 3):
        assert list(map(names, stream_windows(setup_of(), start))) == list(map(names, whole))[start * 4 :]
    drawn = [number for window in whole[:3] for number in window.members]
    assert sorted(drawn) == list(range(7))  # each example once in a pass
    assert [len(window.members) for window in whole[:3]] == [3, 3, 1]
    assert drawn != [number for window in whole[3:6] for number in window.members]
    other = setup_of(seed=1)
    assert [window.members for window in stream_windows(other, 0)] != [window.members for window in whole]


def test_updates_that_train_the_critic_alone_read_no_stream():
    warm = list(stream_windows(setup_of(critic_warmup_steps=1), 1))
    assert len(warm) == 3 * 2 * 2
    assert list(map(names, warm)) == list(map(names, islice(stream_windows(setup_of(), 0), 12)))
    assert list(map(names, stream_windows(setup_of(critic_warmup_steps=1), 0))) == list(map(names, warm))


def test_processes_share_a_batch_and_its_denominator():
    (one,) = islice(stream_windows(setup_of(), 0), 1)
    parts = [next(stream_windows(setup_of(rank, 2), 0)) for rank in range(2)]
    together = [text for part in parts for text in names(part) if text != "|"]
    assert sorted(together) == sorted(text for text in names(one) if text != "|")
    tokens = sum(len(RESPONSES[number]) for number in one.members)
    assert [part.counts["tokens"] for part in (one, *parts)] == [tokens] * 3
