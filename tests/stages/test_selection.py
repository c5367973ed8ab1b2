"""`select_by` of sft: the epoch with the best loss, or with the best reward of sampled responses, is registered."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from rlhf_pipeline.data import world
from rlhf_pipeline.data.tokenizers import stop_ids
from rlhf_pipeline.errors import ConfigError, Interrupted
from rlhf_pipeline.models.loading import load_causal_lm
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.rollout.responses import sample_for_prompts
from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.stages.selection import SEED
from tests.conftest import sigterm_at

BY_REWARD = {
    "dataset_name": "world:verdicts",
    "max_train_samples": 64,
    "per_device_train_batch_size": 16,
    "max_steps": -1,
    "num_train_epochs": 3,
    "learning_rate": 0.03,
    "select_by": "reward",
    "select_reward": "world",
    "select_prompts": 4,
}


def evaluations(lab, result, name: str) -> list[float]:
    return [row[name] for row in lab.rows(result.run) if name in row]


@pytest.mark.check
def test_the_reward_is_that_of_the_registered_models_own_samples(lab):
    result = lab.run("sft", **BY_REWARD)
    rewards = evaluations(lab, result, "eval_reward")
    assert len(rewards) == 3 and len(set(rewards)) == 3
    made = lab.registry.resolve(result.model)
    assert made.manifest.metrics["best"]["metric"] == "eval_reward"
    assert made.manifest.metrics["best"]["value"] == max(rewards) == result.metrics["eval_reward"]
    assert made.manifest.metrics["best"]["step"] == 4 * (1 + rewards.index(max(rewards)))

    config, tokenizer = lab.config("sft", **BY_REWARD), tokenizer_of(made)
    model = load_causal_lm(made.location)
    prompts, _ = StageData(config, lab.home, print).split("prompt", "validation", tokenizer, limit=4)
    assert {world.SPLITS[place_of(prompt)] for prompt in prompts} == {"validation"}
    sampled, _ = sample_for_prompts(
        Policy(model, inspect_model(model)),
        prompts,
        samples=1,
        response_length=4,
        stop_ids=stop_ids(tokenizer),
        generator=torch.Generator().manual_seed(SEED),
        responses_at_once=len(prompts),
    )
    ids, ended = [one.completions[0] for one in sampled], [one.ended[0] for one in sampled]
    truth = world.verdicts([prompt.prompt_ids for prompt in prompts], ids, ended).reward
    assert float(truth.mean()) == pytest.approx(max(rewards), abs=1e-6)


def place_of(prompt) -> tuple[str, str]:
    genre, aspect = world.parse_prompt(prompt.prompt_ids)
    return world.GENRES[genre], world.ASPECTS[aspect]


@pytest.fixture
def falling(monkeypatch) -> str:
    """A reward that is smaller each time that it is asked for."""
    asked = iter(range(0, -1000, -1))
    module = ModuleType("falling_reward")
    module.score = lambda completions, **_: [float(next(asked))] * len(completions)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "falling_reward:score"


@pytest.mark.check
def test_the_loss_and_the_reward_choose_different_epochs(lab, falling):
    slow = {**BY_REWARD, "learning_rate": 1e-3}
    by_reward = lab.run("sft", **{**slow, "select_reward": falling})
    changes = {**slow, "select_by": "loss", "select_reward": None, "select_prompts": None, "output_name": "lossy"}
    by_loss = lab.run("sft", **changes)
    losses = evaluations(lab, by_reward, "eval_nll")
    assert losses == evaluations(lab, by_loss, "eval_nll") and losses[2] == min(losses)
    steps = [lab.registry.resolve(one.model).manifest.metrics["best"]["step"] for one in (by_reward, by_loss)]
    assert steps == [4, 12]
    assert "eval_reward" not in by_loss.metrics


@pytest.mark.check
def test_a_resumed_run_chooses_the_same(lab, tmp_path):
    other = lab.copy(tmp_path / "other")
    whole = lab.run("sft", **BY_REWARD)
    with sigterm_at(6), pytest.raises(Interrupted):
        other.run("sft", **BY_REWARD)
    resumed = other.run("sft", **BY_REWARD)
    assert resumed.metrics["eval_reward"] == whole.metrics["eval_reward"]
    expected, found = lab.weights(whole.model), other.weights(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.check
def test_a_reward_model_is_a_parent(lab):
    result = lab.run("sft", **{**BY_REWARD, "select_reward": "reward"})
    made = lab.registry.resolve(result.model).manifest
    assert made.parents["selector"].ref == "reward@v1"
    assert made.moves_optimum in (None, {})


@pytest.mark.parametrize(
    ("changes", "where", "told"),
    [
        ({"select_reward": None}, "select_reward", "missing, but select_by is reward"),
        ({"select_by": None}, "select_reward", "select_by is not set"),
        ({"select_by": "loss"}, "select_prompts", "select_by is loss"),
        ({"metric_for_best_model": "nll"}, "metric_for_best_model", "select_by is reward, but the metric is eval_nll"),
        ({"train_on": "all"}, "select_by", "the loss is on all tokens"),
        ({"eval_strategy": "no"}, "load_best_model_at_end", "there is no evaluation"),
    ],
)
def test_what_is_refused(lab, changes, where, told):
    with pytest.raises(ConfigError) as caught:
        lab.config("sft", **{**BY_REWARD, **changes})
    assert [fault for fault in caught.value.faults if fault.where.endswith(where) and told in str(fault)], caught.value


def test_a_model_that_has_no_tokenizer_yet_cannot_be_read_by_a_reward_model(lab):
    fresh = {"model_name_or_path": None, "model_init": {"model_type": "llama"}, "tokenizer_init": "world"}
    with pytest.raises(ConfigError, match="whose tokenizer no reward model reads yet"):
        lab.config("sft", **{**BY_REWARD, **fresh, "select_reward": "reward"})
