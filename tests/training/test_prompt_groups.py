"""PPO with several responses to each prompt: they are sampled, scored and trained on together."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.experiment.work import Models, ppo_work
from rlhf_pipeline.stages.ppo_models import check_processes
from rlhf_pipeline.training import ppo_rollouts
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.ppo_batches import Sampled
from rlhf_pipeline.training.ppo_rollouts import prompts_of, shuffled_minibatches
from tests.conftest import stopped_before
from tests.rollout.tree import config_of

GROUPS = {"num_generations": 4, "rollout_batch_size": 16, "per_device_train_batch_size": 8}


def setup_of(rank: int = 0, world_size: int = 1, prompts: int = 5, **changes) -> SimpleNamespace:
    """What the steps of a rollout read of a run on so many prompts, without models."""
    config = config_of(16, **{**GROUPS, "num_mini_batches": 2, "num_ppo_epochs": 2, **changes})
    examples = [Example([1, n], [], [], f"p{n}", "tree") for n in range(prompts)]
    return SimpleNamespace(
        config=config,
        prompts=examples,
        rank=rank,
        world_size=world_size,
        generator=lambda update, purpose: torch.Generator().manual_seed(update),
    )


def responses_to(prompts: list[Example], count: int) -> list[Example]:
    """`count` responses of 1, 2, ... tokens to each prompt, as examples of one response each."""
    return [replace(one, completions=[[3] * (n + 1)], ended=[True]) for one in prompts for n in range(count)]


def test_a_rollout_has_a_prompt_for_each_group_and_prompts_follow_each_other():
    seen = [example.prompt_key for update in range(5) for example in prompts_of(setup_of(), update)]
    assert len(seen) == 5 * 16 / 4
    for epoch in range(4):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == [f"p{n}" for n in range(5)]


def test_a_group_lives_in_one_process():
    mine = [prompts_of(setup_of(rank, 2), 0) for rank in (0, 1)]
    assert [len(prompts) for prompts in mine] == [2, 2]
    assert [example for pair in zip(*mine) for example in pair] == prompts_of(setup_of(), 0)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {}),
        (2, {}),
        (1, {"per_device_train_batch_size": 2}),
        (1, {"num_mini_batches": 8, "per_device_train_batch_size": 2}),  # less than a group in a minibatch
        (1, {"micro_batch_tokens": 12}),
    ],
)
def test_minibatches_keep_the_responses_to_a_prompt_together(processes, changes):
    setup = setup_of(0, processes, **changes)
    rows = responses_to(prompts_of(setup, 0), 4)
    micro, size = setup.config.per_device_train_batch_size, 16 // setup.config.num_mini_batches // processes
    epochs = shuffled_minibatches(setup, Sampled(rows), 0)
    assert len(epochs) == 2 and epochs[0] != epochs[1]
    for minibatches in epochs:
        assert sorted(row for part in minibatches for group in part for row in group) == list(range(16 // processes))
        for minibatch in minibatches:
            prompts = [row // 4 for group in minibatch for row in group]
            assert len(prompts) == size and len(set(prompts)) == max(1, size // 4)
            for group in minibatch:
                assert len(group) <= micro
                if "micro_batch_tokens" not in changes:
                    held = [row // 4 for row in group]
                    assert all(held.count(prompt) == min(4, micro, size) for prompt in held)


def test_one_response_each_is_shuffled_and_cut_as_before():
    setup = setup_of(num_generations=1, prompts=16)
    rows = responses_to(prompts_of(setup, 0), 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    first, second = shuffled_minibatches(setup, Sampled(rows), 0)[0]
    assert {row for group in first for row in group} == set(order[:8])
    assert {row for group in second for row in group} == set(order[8:])


def test_processes_that_would_divide_a_group_are_refused():
    config = config_of(16, **GROUPS)
    check_processes(config, 4)
    with pytest.raises(ConfigError, match="4 prompts with 4 responses each on 8 processes"):
        check_processes(config, 8)


@pytest.mark.parametrize(("changes", "trees"), [({}, 4), ({"per_device_train_batch_size": 2}, 8)])
def test_the_estimate_counts_a_shared_prompt_once(changes, trees):
    """16 responses of 3 tokens to prompts of 2 tokens, in so many trees, in 2 epochs of one update."""
    setup = setup_of(**changes)
    model = ModelShape(100, 4, 10)
    work = ppo_work(setup.config, Models(model, model, trained=7), setup.prompts, 3)
    assert work.tokens_trained == 2 * (16 * 3 + trees * 2)
    assert work.tokens_sampled == 16 * 3
    assert work.prefill == model.decode_flops([], [], [2] * 4)


def sampled_prompts(monkeypatch) -> list[list[list[int]]]:
    """The prompts of each rollout, response by response."""
    seen, scored = [], ppo_rollouts.run_models
    monkeypatch.setattr(
        ppo_rollouts,
        "run_models",
        lambda setup, module, sampled, *rest: (
            seen.append([example.prompt_ids for example in sampled.examples]) or scored(setup, module, sampled, *rest)
        ),
    )
    return seen


@pytest.mark.check
def test_a_run_trains_on_groups_and_pays_for_each_prompt_once(lab, monkeypatch):
    seen = sampled_prompts(monkeypatch)
    result = lab.run("ppo", **GROUPS, max_steps=2)
    for prompts in seen:
        assert len(prompts) == 16 and all(prompts[row] == prompts[row - row % 4] for row in range(16))
        assert prompts[0] != prompts[4]
    rows = lab.rows(result.run)
    assert [row["episodes"] for row in rows] == [16, 32]
    assert max(row["first_minibatch/ratio_error"] for row in rows) <= 1e-5
    # Two epochs over two rollouts of four prompts of 6 tokens.
    assert result.cost["tokens_trained"] - 2 * result.cost["tokens_generated"] == 2 * 2 * 4 * 6
    alone = lab.run("ppo", output_name="alone", **{**GROUPS, "num_generations": 1}, max_steps=2)
    assert result.cost["flops"] < alone.cost["flops"]


@pytest.mark.check
def test_a_killed_run_resumes_bit_for_bit(lab):
    changes = {**GROUPS, "max_steps": 3, "save_steps": 1}
    whole = lab.run("ppo", output_name="whole", **changes)
    with stopped_before(3):
        lab.run("ppo", **changes)
    resumed = lab.run("ppo", **changes)
    expected, found = lab.weights(whole.model), lab.weights(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert lab.rows(resumed.run) == lab.rows(whole.run)
