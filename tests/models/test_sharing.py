"""Frozen models are loaded once within a command, trained ones each time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_pipeline.models import sharing
from rlhf_pipeline.models.modules import assert_independent
from rlhf_pipeline.models.sharing import shared, sharing_models
from rlhf_pipeline.stages.common import find_model, load_policy, load_reward_model, tokenizer_of


def frozen(width: int = 1) -> nn.Module:
    return nn.Linear(width, 1, bias=False).requires_grad_(False)


def test_outside_of_a_command_nothing_is_kept():
    assert shared("a", frozen) is not shared("a", frozen)


def test_within_one_it_is_until_the_end():
    with sharing_models():
        first = shared("a", frozen)
        assert shared("a", frozen) is first
        assert shared("b", frozen) is not first
        with sharing_models():
            assert shared("a", frozen) is not first
        assert shared("a", frozen) is first
    with sharing_models():
        assert shared("a", frozen) is not first


def test_the_least_recently_used_models_make_room(monkeypatch):
    monkeypatch.setattr(sharing, "KEPT_BYTES", 2 * 4)  # two models of one fp32 weight
    with sharing_models():
        a, b = shared("a", frozen), shared("b", frozen)
        assert shared("a", frozen) is a
        shared("c", frozen)
        assert shared("a", frozen) is a
        assert shared("b", frozen) is not b
        large = shared("large", lambda: frozen(3))
        assert shared("large", lambda: frozen(3)) is not large


def test_a_model_that_is_trained_is_not_shared():
    with sharing_models(), pytest.raises(AssertionError, match="only frozen models"):
        shared("a", lambda: nn.Linear(1, 1))


def test_policies_and_reward_models(tiny):
    config, cpu = tiny.config("evaluate"), torch.device("cpu")
    sft, reward = (
        find_model(tiny.registry, name, role) for name, role in (("sft", "policy"), ("reward", "reward_model"))
    )
    tokenizer = tokenizer_of(sft)
    with sharing_models():
        one = load_policy(sft, config, tokenizer, cpu, frozen=True)
        cold = load_policy(sft, config, tokenizer, cpu, frozen=True, temperature=0.5)
        assert cold.model is one.model and (one.temperature, cold.temperature) == (1.0, 0.5)
        assert not (one.training or cold.training or cold.entropy)
        half = load_policy(sft, config.model_copy(update={"dtype": "bfloat16"}), tokenizer, cpu, frozen=True)
        assert half.model.dtype == torch.bfloat16
        trained = [load_policy(sft, config, tokenizer, cpu) for _ in range(2)]
        assert_independent(trained[0], one)
        assert_independent(*trained)
        scorer = load_reward_model(reward, config, cpu)
        assert load_reward_model(reward, config, cpu) is scorer
