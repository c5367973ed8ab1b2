"""Weights in memory for a program that reads a model's files: their names, ties, adapters."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.models.handover import weights_of_files, without_adapters
from tests.conftest import TINY_LLAMA


def tiny_model(model_type, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    llama = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16} if model_type == "gpt2" else llama
    config = AutoConfig.for_model(model_type, **sizes, vocab_size=12, eos_token_id=0, bos_token_id=0)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_only_the_actors_weights_are_handed_over_and_tied_ones_once():
    from rlhf_pipeline.models.forward import Reader
    from rlhf_pipeline.models.modules import make_actor_critic

    model = tiny_model("gpt2")
    policy = make_actor_critic(model, Reader(), "sft")
    weights = weights_of_files(without_adapters(policy.language_model))
    assert "transformer.wte.weight" in weights and "lm_head.weight" not in weights
    assert {k: v.data_ptr() for k, v in weights.items()} == {k: v.data_ptr() for k, v in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_weights_have_the_names_of_files(model_type, tmp_path):
    """GPT-NeoX calls its head embed_out in files and lm_head in memory."""
    from safetensors.torch import load_file

    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    stored, weights = load_file(tmp_path / "model.safetensors"), weights_of_files(model)
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in stored)
    assert ("embed_out.weight" in weights) is (model_type == "gpt_neox")


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_merged_into_copies(tied):
    """The weights that are handed over compute what the model with its adapters does; the model keeps its own."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_model("llama", tie_word_embeddings=tied)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"]), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(10)[None]
    plain = tiny_model("llama", tie_word_embeddings=False)
    weights = weights_of_files(without_adapters(model))
    assert plain.load_state_dict(weights, strict=True)
    difference = (plain(ids).logits - model(ids).logits).abs().max()
    assert difference <= 1e-5 and not any("lora" in name for name in weights)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
