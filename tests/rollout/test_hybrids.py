"""Sampling from models with recurrent layers, whose caches cannot drop the rows of finished responses."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model
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


@pytest.mark.check
@pytest.mark.parametrize("name", ["qwen3_5_text", "jamba", "falcon_h1"])
def test_a_recurrent_state_follows_its_beam(name):
    """A beam for every prefix of two tokens finds the likeliest response of all, by plain forward passes."""
    model, size = hybrid(name), SIZES["vocab_size"]
    policy, prompt = Policy(model, inspect_model(model)), [6, 7, 8]
    with torch.no_grad():
        first = torch.log_softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
        rows = torch.tensor([[*prompt, token] for token in range(size)])
        second = torch.log_softmax(model(input_ids=rows).logits[:, -1], -1)
        rows = torch.cat([rows.repeat_interleave(size, 0), torch.arange(size).repeat(size)[:, None]], 1)
        third = torch.cat([torch.log_softmax(model(input_ids=part).logits[:, -1], -1) for part in rows.split(size)])
    totals = first[:, None, None] + second[:, :, None] + third.view(size, size, size)
    best = [place.item() for place in torch.unravel_index(totals.argmax(), totals.shape)]
    decoding = Decoding(do_sample=False, num_beams=size * size)
    options = {"samples": 1, "response_length": 3, "stop_ids": [], "responses_at_once": 4096}
    example, draw = Example(prompt, [], [], prompt_key="", where=""), torch.Generator()
    _, [[response]] = sample_for_prompts(policy, [example], generator=draw, decoding=decoding, **options)
    assert (response.ids, response.ended) == (best, False)


def test_a_model_that_cannot_be_sampled_from_is_refused_before_its_reward_model_is_trained(lab, monkeypatch):
    monkeypatch.setattr("rlhf_pipeline.models.selfcheck._decodes_with_a_cache", lambda *_: False)
    with pytest.raises(BadInput, match="sampling is impossible"):
        lab.run("train-rm")
    assert not any("bradley_terry" in file.read_text() for file in (lab.home / "runs").glob("*/metrics.jsonl"))
