"""RLOO and GRPO against TRL 1.16's own trainers, on one fixed batch of responses from the tree.

The trainers' methods run on a stand-in for the trainer: nothing is sampled, and log-probabilities are the tree's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from tests.rollout.tree import (
    BETA,
    EXAMPLES,
    HORIZON,
    LENGTHS,
    MASK,
    PROMPT,
    RESPONSES,
    REWARD,
    Table,
    World,
    error,
    ppo_windows,
    step,
)

pytestmark = pytest.mark.check

ROWS = [1, 4, 9, 20, 0, 6, 16, 30]  # two groups of four, lengths 1 to 4
GROUP = 4
LOSSES = {"grpo": "responses", "dr_grpo": "sequences", "bnpo": "tokens"}
"""TRL's `loss_type` and the `loss_normalization` that is the same."""


@pytest.fixture(scope="module")
def world() -> World:
    return World(Table(1), Table(2))


def trainer(world: World, **given) -> MagicMock:
    """A stand-in for a trainer of TRL with the settings that its methods read."""
    made = MagicMock()
    off = (
        "aux_loss_enabled",
        "mask_truncated_completions",
        "normalize_advantages",
        "use_vllm",
        "tools",
        "environments",
    )
    for name in (*off, "_entropy_bonus_enabled"):
        setattr(made, name, False)
    for name in ("reward_clip_range", "pad_to_multiple_of", "environment_factories", "off_policy_mask_threshold"):
        setattr(made, name, None)
    made.args.delta, made.args.use_bias_correction_kl = None, False
    made.args.gradient_accumulation_steps = made.args.steps_per_generation = made.num_iterations = 1
    made.beta, made.num_generations, made.max_completion_length = BETA, GROUP, HORIZON
    made.epsilon_low = made.epsilon_high = 0.2
    made.importance_sampling_level, made.top_entropy_quantile = "token", 1.0
    made.multi_objective_aggregation, made.current_gradient_accumulation_steps = "sum_then_normalize", 1
    made.reward_weights, made.reward_func_names = torch.ones(1, dtype=torch.float64), ["reward"]
    made._calculate_rewards.return_value = REWARD[ROWS][:, None].clone()
    made._tokenizer.pad_token_id, made.accelerator.device, made.accelerator.process_index = 0, "cpu", 0
    made.accelerator.gather.side_effect = lambda values: values
    made.accelerator.reduce.side_effect = lambda values, reduction: values

    def logprobs(model, *_, **__):
        policy = world.reference if model is made.ref_model else world.policy
        found = world.logprobs(policy)[ROWS]
        return found, torch.zeros_like(found), None

    made._get_per_token_logps_and_entropies.side_effect = logprobs
    for name, value in given.items():
        setattr(made, name, value)
    return made


def theirs(world: World, algorithm: str, shift: float = 0.0, **settings) -> tuple[Tensor, Tensor]:
    """Advantages (8,) and gradient of TRL's trainer; `shift` raises each old log-probability."""
    module = pytest.importorskip(f"trl.trainer.{algorithm}_trainer")
    kind = getattr(module, f"{algorithm.upper()}Trainer")
    made = trainer(world, **settings)
    responses = [RESPONSES[row] for row in ROWS]
    some = ([PROMPT] * len(ROWS), responses)
    made._generate.return_value = (
        (*some, [""] * len(ROWS)) if algorithm == "rloo" else (*some, None, [""] * len(ROWS), None, {}, None, None)
    )
    inputs = kind._generate_and_score_completions(made, [{"prompt": "p"}] * len(ROWS))
    if algorithm == "rloo":
        inputs["old_logps"] = inputs["old_logps"] + shift * LENGTHS[ROWS].double()
    else:
        inputs["old_per_token_logps"] = world.logprobs(world.policy)[ROWS].detach() + shift
    return inputs["advantages"], world.gradient(kind._compute_loss(made, None, inputs))


def ours(world: World, shift: float = 0.0, **changes) -> tuple[Tensor, Tensor]:
    """Advantages (8,) and gradient of the package's first window."""
    examples = [EXAMPLES[row] for row in ROWS]
    (window,) = ppo_windows(world.policy, world.reference, examples, num_generations=GROUP, **changes)
    advantages, loss = torch.zeros(len(ROWS), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for one in window.micro_batches:
        moved = replace(one, old_logprobs=one.old_logprobs + shift)
        advantages[ROWS.index(RESPONSES.index(one.examples[0].completions[0]))] = one.advantages[0, 0]
        loss = loss + step(world.policy, moved, **changes).total(window.counts)
    return advantages, world.gradient(loss)


def test_rloo_has_the_same_advantages_and_the_same_step_on_fresh_samples(world):
    """TRL divides by responses, which is response_length times our division by sequences x response_length."""
    advantages, gradient = theirs(world, "rloo")
    found, step_found = ours(world, algorithm="rloo", loss_normalization="sequences")
    torch.testing.assert_close(found, advantages, rtol=0, atol=1e-10)
    assert error(HORIZON * step_found, gradient) <= 1e-10


def test_rloo_here_clips_the_ratio_of_each_token_and_there_that_of_the_response(world):
    """Ratios of 1.1 are within the clip range, but the product of the ratios of two tokens or more is not."""
    shift = -math.log(1.1)
    kept = torch.zeros(len(ROWS), dtype=torch.float64)
    advantages, gradient = theirs(world, "rloo", shift)
    for row, (advantage, length) in enumerate(zip(advantages, LENGTHS[ROWS], strict=True)):
        kept[row] = 1.1 ** length.item() if advantage < 0 or length == 1 else 0.0

    def expected(ratio: Tensor | float) -> Tensor:
        response = torch.where(MASK[ROWS], world.logprobs(world.policy)[ROWS], 0.0).sum(1)
        return world.gradient(-(ratio * advantages * response).mean())

    assert error(gradient, expected(kept)) <= 1e-10
    _, found = ours(world, shift, algorithm="rloo", loss_normalization="sequences")
    assert error(HORIZON * found, expected(1.1)) <= 1e-10


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_grpo_with_the_kl_in_the_loss_is_that_of_trl(world, loss_type, scale, shift):
    advantages, gradient = theirs(world, "grpo", shift, loss_type=loss_type, scale_rewards=scale)
    changes = {"kl_in": "loss", "scale_rewards": scale, "loss_normalization": LOSSES[loss_type]}
    found, step_found = ours(world, shift, algorithm="grpo", **changes)
    within = 1e-7 if scale == "group" else 1e-10  # TRL has the factor of the standard deviation in float32
    torch.testing.assert_close(found, advantages, rtol=0, atol=within)
    assert error(step_found, gradient) <= within


def test_grpo_by_default_is_trl_without_its_kl_on_returns_that_have_it(world):
    """TRL has no KL in the return; its trainer without a KL gets our returns as rewards."""
    logprobs, ref = (world.response_logprobs(policy).detach()[ROWS] for policy in (world.policy, world.reference))
    returns = (REWARD[ROWS] - BETA * (logprobs - ref))[:, None]
    settings = {"_calculate_rewards": MagicMock(return_value=returns), "scale_rewards": "none", "loss_type": "bnpo"}
    advantages, gradient = theirs(world, "grpo", beta=0.0, **settings)
    found, step_found = ours(world, algorithm="grpo")
    torch.testing.assert_close(found, advantages, rtol=0, atol=1e-10)
    assert error(step_found, gradient) <= 1e-10
