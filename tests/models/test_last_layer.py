"""The last layer computes what is read, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.models.forward import Reader, completion_logprobs, hidden_states, trunk_of
from rlhf_pipeline.models.last_layer import compute_all, reading, skip_unread, skipping_modules
from rlhf_pipeline.models.selfcheck import inspect_model

ARCHITECTURES = {"llama": 3, "qwen2": 3, "gpt2": 2, "gpt_neox": 2}  # modules that work position by position


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["flat", "trees", "rows"])
def test_logprobs_and_gradients_are_those_of_the_whole_layer(make_model, examples, name, layout):
    model = make_model(name, dtype=torch.float64).train()
    inspect_model(model)
    batch, found = pack(examples, layout=layout, flat_from=0), []
    weights = torch.linspace(-1, 2, batch.num_tokens, dtype=torch.float64)
    for skip in (True, False):
        (skip_unread if skip else compute_all)(trunk_of(model))
        assert len(skipping_modules(trunk_of(model))) == (ARCHITECTURES[name] if skip else 0)
        model.zero_grad()
        logprobs = completion_logprobs(model, Reader(layout), batch)[0]
        (logprobs * weights).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logprobs.detach(), gradients))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if name in ("llama", "qwen2") else 1e-10)  # fp32 norms
    assert found[0][1].abs().max() > 1e-2


def test_only_rows_that_are_read_go_through(make_model, examples):
    model = make_model("llama")
    inspect_model(model)
    trunk, seen = trunk_of(model), []
    trunk.layers[-1].mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    trunk.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    batch = pack(examples, layout="flat", flat_from=0)
    hidden_states(trunk, batch, batch.predict_index)
    hidden_states(trunk, batch, batch.last_index)
    hidden_states(trunk, batch)
    whole = batch.active_tokens
    assert seen == [whole, batch.num_predicting, whole, batch.num_completions, whole, whole]
    assert batch.num_predicting == len(set(batch.predict_index.tolist())) < batch.num_tokens


def test_a_position_may_be_asked_for_twice(make_model, examples):
    model = make_model("llama")
    inspect_model(model)
    batch = pack(examples, layout="flat", flat_from=0)
    index = torch.tensor([7, 3, 7, 0])
    with torch.no_grad():
        found = hidden_states(trunk_of(model), batch, index)
        whole = hidden_states(trunk_of(model), batch)
    torch.testing.assert_close(found, whole.index_select(0, index), rtol=0, atol=1e-6)


def test_what_is_read_ends_with_its_block(make_model, examples):
    model = make_model("llama")
    inspect_model(model)
    trunk, batch = trunk_of(model), pack(examples, layout="flat", flat_from=0)
    with torch.no_grad():
        before = hidden_states(trunk, batch)
        with pytest.raises(KeyError), reading(trunk, torch.tensor([0])):
            raise KeyError
        assert torch.equal(hidden_states(trunk, batch), before)


def test_a_copy_skips_too_and_names_stay(make_model, examples):
    model = make_model("llama")
    names = list(model.state_dict())
    inspect_model(model)
    inspect_model(model)  # once more hooks nothing twice
    twin = copy.deepcopy(trunk_of(model))
    assert len(skipping_modules(twin)) == 3 and list(model.state_dict()) == names
    assert all(len(module._forward_pre_hooks) == 1 for module in skipping_modules(twin))
    batch = pack(examples, layout="flat", flat_from=0)
    with torch.no_grad():
        found = hidden_states(twin, batch, batch.last_index)
        expected = hidden_states(trunk_of(model), batch, batch.last_index)
    assert torch.equal(found, expected)
    compute_all(twin)
    assert not skipping_modules(twin) and len(skipping_modules(trunk_of(model))) == 3


def test_an_architecture_whose_feed_forward_takes_more_is_left_whole(make_model):
    """BLOOM's adds the residual itself: the self-check finds that rows no longer fit."""
    model = make_model("bloom")
    inspect_model(model)
    assert not skipping_modules(trunk_of(model))
