"""Policy, actor-critic, independence of frozen models, dropout."""

from __future__ import annotations

import copy
import types

import pytest
import torch

from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.models.forward import Reader, hidden_states, trunk_of
from rlhf_pipeline.models.loading import (
    init_causal_lm,
    init_reward_model,
    load_causal_lm,
    save_model,
    store_reward_shift,
)
from rlhf_pipeline.models.modules import Policy, assert_independent, describe_critic, make_actor_critic
from rlhf_pipeline.models.selfcheck import inspect_model, read_reward_model

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def batch(examples):
    return pack(examples, row_length=40)


def test_policy_is_the_forward_pass_at_its_temperature(make_model, examples, batch):
    model = make_model("llama")
    scores = Policy(model, Reader(), temperature=0.5)(batch)
    assert scores.values is None and not scores.entropy.requires_grad and scores.logprobs.requires_grad
    example, completion = examples[0], examples[0].completions[0]
    ids = torch.tensor([example.prompt_ids + completion])
    table = torch.log_softmax(model(input_ids=ids).logits[0] / 0.5, -1)
    expected = [table[len(example.prompt_ids) + k - 1, token].item() for k, token in enumerate(completion)]
    assert scores.logprobs[: len(completion)].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name, reader", [("llama", Reader()), ("gemma2", Reader(head="own"))])
def test_a_shared_head_says_0_at_step_0_and_learns_through_the_actor(make_model, batch, name, reader):
    model = make_model(name)
    module = make_actor_critic(model, reader, "shared")
    scores = module(batch)
    assert scores.values.shape == scores.logprobs.shape and not scores.values.any()
    torch.testing.assert_close(scores.logprobs, Policy(model, reader)(batch).logprobs, **CLOSE)
    assert module.critic is None
    (scores.values - 1).square().sum().backward()
    assert module.value_head.weight.grad.abs().max() > 0


def test_the_critic_of_a_reward_model_reads_its_score_at_the_last_token(make_model, batch):
    scorer = read_reward_model(make_model("llama", scorer=True, seed=5))
    store_reward_shift(scorer.model, 0.75)
    module = make_actor_critic(make_model("llama"), Reader(), "reward_model", reward_model=scorer)
    assert module.value_head.bias.item() == -0.75
    with torch.no_grad():
        read = module.value_head(hidden_states(module.critic, batch).index_select(0, batch.last_index)).squeeze(-1)
        torch.testing.assert_close(read, scorer(batch), **CLOSE)


def test_values_are_read_at_the_positions_that_predict_each_token(make_model, examples):
    scorer = read_reward_model(make_model("llama", scorer=True, seed=5))
    module = make_actor_critic(make_model("llama"), Reader(), "reward_model", reward_model=scorer)
    example = examples[1]
    with torch.no_grad():
        found = module(pack([example])).values
        # V before token k is the plain score of the prefix without token k.
        sequence = example.prompt_ids + example.completions[0]
        prefixes = [sequence[: len(example.prompt_ids) + k] for k in range(len(example.completions[0]))]
        expected = torch.stack([scorer.model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in prefixes])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    "actor, scorer",
    [("llama", "bloom"), ("llama", "mistral"), ("bloom", "llama"), ("llama", "gemma2"), ("gemma2", "gpt2")],
)
def test_actor_and_critic_of_two_architectures_read_the_same_batch(make_model, examples, actor, scorer):
    model, judge = make_model(actor), read_reward_model(make_model(scorer, scorer=True, seed=5))
    module = make_actor_critic(model, inspect_model(model), "reward_model", reward_model=judge)
    with torch.no_grad():
        found = module(pack(examples[:2], layout=module.reader.layout, flat_from=0))
        values, logprobs = [], []
        for example in examples[:2]:
            for completion in example.completions:
                sequence = torch.tensor([example.prompt_ids + completion])
                table = torch.log_softmax(model(input_ids=sequence).logits[0], -1)
                for k, token in enumerate(completion):
                    prefix = sequence[:, : len(example.prompt_ids) + k]
                    values.append(judge.model(input_ids=prefix).logits[0, 0])
                    logprobs.append(table[prefix.shape[1] - 1, token])
    torch.testing.assert_close(found.values, torch.stack(values), **CLOSE)
    torch.testing.assert_close(found.logprobs, torch.stack(logprobs), **CLOSE)


def test_critics_have_weights_of_their_own(make_model, batch):
    actor, scorer = make_model("llama"), read_reward_model(make_model("llama", scorer=True, seed=5))
    scorer.requires_grad_(False)
    for init, source in (("sft", actor), ("reward_model", scorer.model)):
        module = make_actor_critic(actor, Reader(), init, reward_model=scorer)
        assert_independent(module.critic, source)
        assert all(parameter.requires_grad for parameter in module.critic.parameters())
        theirs = trunk_of(source).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in module.critic.state_dict().items())
    module = make_actor_critic(actor, Reader(), "sft")
    assert not module(batch).values.any()
    module.value_head.weight.data.fill_(1.0)
    module(batch).values.sum().backward()
    assert all(parameter.grad is None for parameter in actor.parameters())


def test_a_frozen_actor_gets_no_gradient_and_its_value_head_does(make_model, batch):
    module = make_actor_critic(make_model("llama"), Reader(), "shared")
    module.actor_frozen = True
    scores = module(batch)
    assert not scores.logprobs.requires_grad and scores.values.requires_grad
    (scores.values - 1).square().sum().backward()
    assert all(parameter.grad is None for parameter in module.actor.parameters())
    assert module.value_head.weight.grad.abs().max() > 0


def test_a_critic_from_a_reward_model_needs_one(make_model):
    with pytest.raises(ValueError, match="needs a reward model"):
        make_actor_critic(make_model("llama"), Reader(), "reward_model")


@pytest.mark.parametrize(
    "init, words", [("reward_model", "reward model rm@v1"), ("sft", "SFT model"), ("shared", "actor's trunk")]
)
def test_the_critic_is_described_by_where_it_comes_from(init, words):
    assert words in describe_critic(init, "rm@v1")


def test_a_copy_is_independent(make_model):
    policy = make_model("llama")
    assert_independent(policy, copy.deepcopy(policy))
    assert_independent(policy, make_model("llama"))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_shared_weights_are_found(make_model, name):
    policy = make_model(name)
    with pytest.raises(RuntimeError, match="shares memory with the policy"):
        assert_independent(policy, policy)
    frozen = copy.deepcopy(policy)
    frozen.model.layers[1].mlp.up_proj.weight = policy.model.layers[1].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj"):
        assert_independent(policy, frozen)
    view = copy.deepcopy(policy)
    view.model.norm.weight = torch.nn.Parameter(policy.model.norm.weight.data[:])
    with pytest.raises(RuntimeError, match="shares memory"):
        assert_independent(policy, view)


def test_a_patched_forward_of_the_frozen_model_is_found(make_model):
    policy = make_model("llama")
    assert_independent(policy, make_model("llama"))
    original = policy.forward

    def patched(self, *args, **options):
        return original(*args, **options)  # the original's weights, wherever this method is bound

    policy.forward = types.MethodType(patched, policy)
    frozen = make_model("llama")
    assert_independent(policy, frozen)  # what was done to the policy is not the frozen model's matter
    copied = copy.deepcopy(policy)
    with pytest.raises(RuntimeError, match="top module has a patched forward"):
        assert_independent(policy, copied)
    inner = make_model("llama")
    inner.model.forward = types.MethodType(lambda self, **_: None, policy.model)
    with pytest.raises(RuntimeError, match="model has a patched forward"):
        assert_independent(policy, inner)


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}


@pytest.fixture
def saved_gpt2(make_model, tmp_path):
    """GPT-2 as it is published: its config asks for dropout."""
    from transformers import AutoConfig

    path = tmp_path / "gpt2"
    model = make_model("gpt2")
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.1
    save_model(model, world.tokenizer(), path)
    assert AutoConfig.from_pretrained(path).resid_pdrop == 0.1
    return path


def test_two_train_mode_forwards_of_gpt2_are_bit_equal(saved_gpt2, batch):
    for model in (load_causal_lm(saved_gpt2), init_causal_lm(GPT2, world.tokenizer(), seed=0)):
        policy = Policy(model, Reader()).train()
        first, second = policy(batch), policy(batch)
        assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.entropy, second.entropy)
        assert torch.equal(first.logprobs, policy.eval()(batch).logprobs)


def test_dropout_stays_where_it_is_asked_for(saved_gpt2, batch):
    policy = Policy(load_causal_lm(saved_gpt2, dropout=True), Reader()).train()
    torch.manual_seed(0)
    assert not torch.equal(policy(batch).logprobs, policy(batch).logprobs)


def test_reward_models_have_no_dropout_either(saved_gpt2, batch):
    scorer = read_reward_model(init_reward_model(saved_gpt2, world.tokenizer(), seed=0)).train()
    assert torch.equal(scorer(batch), scorer(batch))
