"""Sampling from models with recurrent layers, whose caches cannot drop the rows of finished responses."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.rollout.prefill import prefill
from rlhf_pipeline.rollout.responses import sample_for_prompts

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
HYBRIDS = {
    "qwen3_5_text": {**LINEAR, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    # Attention and a recurrent state in one layer: its `batch_select_indices` selects the keys and values alone.
    "falcon_h1": {**MAMBA, "head_dim": 8, "mamba_d_ssm": 32},
}


def hybrid(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **HYBRIDS[name])).eval()


@pytest.mark.parametrize("name", ["qwen3_5_text", "jamba", "falcon_h1"])
def test_responses_have_the_log_probabilities_of_their_own_sequences(name):
    model = hybrid(name)
    stops = [1, 2, 3, 4, 5]
    prompts = [Example([6, 7, 8][: 1 + place % 3], [], [], prompt_key="", where="") for place in range(12)]
    options = {"samples": 1, "response_length": 10, "stop_ids": stops, "responses_at_once": 12}
    draw = torch.Generator().manual_seed(0)
    _, groups = sample_for_prompts(Policy(model, inspect_model(model)), prompts, generator=draw, **options)
    drawn = [response for (response,) in groups]
    assert len({len(response.ids) for response in drawn}) > 3  # some end much earlier than others
    for prompt, response in zip(prompts, drawn, strict=True):
        assert [place for place, token in enumerate(response.ids) if token in stops] == (
            [len(response.ids) - 1] * response.ended
        )
        ids = torch.tensor([prompt.prompt_ids + response.ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        start = len(prompt.prompt_ids)
        expected = [logprobs[start - 1 + place, token] for place, token in enumerate(response.ids)]
        torch.testing.assert_close(torch.tensor(response.logprobs), torch.stack(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_5_text", "jamba", "falcon_h1"])
def test_a_recurrent_state_follows_its_row(name):
    """As beam search moves rows: the logits are those of plain forward passes over each row's own tokens."""
    model, prompts = hybrid(name), [[6, 7, 8], [9, 10], [11, 12, 13], [14]]
    kept, first, second = [2, 0, 0, 3, 2], [20, 21, 22, 23], [30, 31, 32, 33, 34]
    with torch.no_grad():
        state = prefill(model, prompts, room=2, cache_config=model.config)
        state.advance(model, torch.tensor(first))
        state.select(torch.tensor(kept))
        state.advance(model, torch.tensor(second))
        rows = [[*prompts[row], first[row], token] for row, token in zip(kept, second, strict=True)]
        expected = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows]
    torch.testing.assert_close(state.logits, torch.stack(expected), rtol=0, atol=1e-4)


def test_a_model_that_cannot_be_sampled_from_is_refused_before_its_reward_model_is_trained(lab, monkeypatch):
    monkeypatch.setattr("rlhf_pipeline.models.selfcheck._decodes_with_a_cache", lambda *_: False)
    with pytest.raises(BadInput, match="sampling is impossible"):
        lab.run("train-rm")
    assert not any("bradley_terry" in file.read_text() for file in (lab.home / "runs").glob("*/metrics.jsonl"))
