"""Tiny models of many architectures, with weights large enough that a wrong mask shows."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.data.tokenize import Example

VOCAB, PAD = 32, 0
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GEMMA = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
SETTINGS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "mistral": {"sliding_window": 3},
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "bloom": {"n_layer": 2, "n_head": 2},
}
DROPOUT = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "bloom": ("hidden_dropout", "attention_dropout")}


def build(name: str, *, scorer: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A causal language model, or with `scorer` a sequence classifier with one label, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    model_type = name.split("-")[0]
    off = dict.fromkeys(DROPOUT.get(model_type, ()), 0.0)
    keep = ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
    common = {key: COMMON[key] for key in keep} | {"hidden_size": 16} if model_type in DROPOUT else dict(COMMON)
    values = {**common, **off, **SETTINGS[name], **changes}
    attention = values.pop("attn_implementation", None)
    config = AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if value is not None})
    config.pad_token_id, config.eos_token_id = PAD, 1
    torch.manual_seed(seed)
    if scorer:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():  # norms and biases away from 1 and 0
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def make_model():
    torch.set_num_threads(1)
    return build


def tokens(draw: torch.Generator, count: int) -> list[int]:
    return torch.randint(2, VOCAB, (count,), generator=draw).tolist()


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Prompts of 1 to 9 tokens with one to three completions of 1 to 8: far longer than the sliding windows."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(7, (5, 8, 1)), (1, (3,)), (4, (2, 6)), (9, (8, 8)), (2, (1, 4, 2))]
    return [
        Example(
            tokens(draw, prompt),
            [[*tokens(draw, length - 1), 1] for length in lengths],
            [True] * len(lengths),
            prompt_key=str(number),
            where=f"row {number}",
        )
        for number, (prompt, lengths) in enumerate(shapes)
    ]
