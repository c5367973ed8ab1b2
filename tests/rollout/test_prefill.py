"""Prompts into a cache: each different one once, without padding, and the same logits as ever."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from rlhf_pipeline.models.forward import trunk_of
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.rollout.prefill import RoomyLayer, prefill
from rlhf_pipeline.rollout.sampler import draw_uniforms, sample

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7, 8, 9], [11], [5, 6, 7, 8, 9], [3, 4, 12], [11], [5, 6, 7]]
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert inspect_model(model).layout == "flat"
    return model


def test_a_layer_with_room_holds_what_a_growing_one_holds():
    draw = torch.Generator().manual_seed(0)
    roomy, growing = RoomyLayer(9), DynamicLayer()
    rows = 4
    for step, width in enumerate((5, 1, 1, 1)):
        keys, values = torch.randn(rows, 2, width, 3, generator=draw), torch.randn(rows, 2, width, 6, generator=draw)
        for found, expected in zip(roomy.update(keys, values), growing.update(keys, values)):
            assert torch.equal(found, expected)
        assert roomy.get_seq_length() == growing.get_seq_length() == 5 + step
        assert roomy.get_mask_sizes(1) == growing.get_mask_sizes(1)
        if step == 1:
            kept = torch.tensor([0, 2, 3])
            rows = 3
            for layer in (roomy, growing):
                layer.batch_select_indices(kept)
    with pytest.raises(AssertionError, match="11 positions in a cache of 9"):
        roomy.update(torch.zeros(3, 2, 3, 3), torch.zeros(3, 2, 3, 6))


def test_a_new_token_moves_no_other_one():
    layer = RoomyLayer(4)
    first, _ = layer.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3))
    second, _ = layer.update(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3))
    assert first.data_ptr() == second.data_ptr()


@torch.no_grad()
def test_flat_and_padded_prompts_agree_and_each_is_run_once(model):
    fed = []

    def watched(**options):
        fed.append(options["input_ids"].tolist())
        return model(**options)

    options = {"room": 3, "cache_config": model.config}
    padded = prefill(watched, PROMPTS, **options)
    flat = prefill(watched, PROMPTS, trunk=trunk_of(model), **options)
    assert fed[1] == [[5, 6, 7, 8, 9, 11, 3, 4, 12, 5, 6, 7]] and len(fed[0]) == 6
    torch.testing.assert_close(flat.logits, padded.logits, **CLOSE)
    assert torch.equal(flat.attention, padded.attention) and torch.equal(flat.positions, padded.positions)
    assert flat.positions.tolist() == [4, 0, 4, 2, 0, 2]
    seen = flat.attention.bool()[:, None, :, None]
    for one, other in zip(flat.cache.layers, padded.cache.layers):
        assert type(one) is type(other) is RoomyLayer and one.room == 5 + 3
        for found, expected in ((one.keys, other.keys), (one.values, other.values)):
            torch.testing.assert_close(found.masked_fill(~seen, 0), expected.masked_fill(~seen, 0), **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_responses_whatever_the_cache(model, temperature):
    uniforms = draw_uniforms(len(PROMPTS), 9, torch.Generator().manual_seed(1))
    options = {"temperature": temperature}
    endless = sample(model, PROMPTS, uniforms, stop_ids=[-1], **options)
    tokens = Counter(token for response in endless for token in response.ids[1:-1])
    options["stop_ids"] = [tokens.most_common(1)[0][0]]  # so that some responses end early
    found = [
        sample(model, PROMPTS, uniforms, cache_config=model.config, trunk=trunk_of(model), **options),
        sample(model, PROMPTS, uniforms, cache_config=model.config, **options),
        sample(model, PROMPTS, uniforms, **options),  # without a config: a cache that grows
    ]
    for other in found[1:]:
        assert [response.ids for response in other] == [response.ids for response in found[0]]
        for one, two in zip(found[0], other):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert len({len(response.ids) for response in found[0]}) > 1  # some ended and left the batch


def test_a_sliding_window_keeps_its_own_cache():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3, head_dim=4)).eval()
    reader = inspect_model(model)
    assert reader.layout == "flat" and reader.decodes
    with torch.no_grad():
        state = prefill(model, PROMPTS, room=3, cache_config=model.config, trunk=trunk_of(model))
        expected = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]
    assert isinstance(state.cache, DynamicCache)
    torch.testing.assert_close(state.logits, torch.stack(expected), **CLOSE)


@torch.no_grad()
def test_logits_are_those_of_the_plain_forward_pass(model):
    state = prefill(model, PROMPTS, room=0, cache_config=model.config, trunk=trunk_of(model))
    expected = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]
    torch.testing.assert_close(state.logits, torch.stack(expected), **CLOSE)
