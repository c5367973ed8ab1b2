"""Lean layers: the architectures that have them, the same results, less memory; copies and adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_pipeline.models.lean_layers import use_lean_layers

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def tiny(kind: str, **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, "pad_token_id": 0, **changes}))


def lean_names(model: nn.Module) -> set[str]:
    """The last parts of the names of the modules whose class has changed."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).forward.__module__.startswith("rlhf_pipeline.")
    }


def results(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.arange(1, 21).view(2, 10)
    logits = model(input_ids=ids, use_cache=False).logits
    torch.log_softmax(logits, -1)[..., 3].sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


BOTH = {"input_layernorm", "post_attention_layernorm", "norm", "mlp"}


@pytest.mark.parametrize(
    ("kind", "lean"),
    [
        ("llama", BOTH),
        ("mistral", BOTH),
        ("qwen2", BOTH),
        ("qwen3", BOTH | {"q_norm", "k_norm"}),
        ("gemma2", set()),  # its norm multiplies by 1 + w, its MLP has another gate
        ("gpt_neox", set()),
    ],
)
def test_results_stay_the_same(kind: str, lean: set[str]) -> None:
    model = tiny(kind)
    plain = copy.deepcopy(model)
    names = [type(module).__name__ for module in model.modules()]
    use_lean_layers(model)
    use_lean_layers(model)  # a second call changes nothing
    assert lean_names(model) == lean and lean_names(plain) == set()
    assert [type(module).__name__ for module in model.modules()] == names
    (ours, our_gradients), (theirs, their_gradients) = results(model), results(plain)
    assert torch.equal(ours, theirs) and our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6)


def test_a_copy_computes_with_its_own_weights() -> None:
    model = tiny("llama")
    use_lean_layers(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not any("forward" in vars(module) for module in other.modules())
    assert not torch.equal(results(model)[0], results(other)[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.div_(1.5)
    torch.testing.assert_close(results(model)[0], results(other)[0])


def test_an_mlp_with_another_gate_or_forward_stays() -> None:
    model = tiny("llama", hidden_act="gelu")
    first = model.get_submodule("model.layers.0.input_layernorm")
    first.forward = type(first).forward.__get__(first)  # as libraries patch it
    use_lean_layers(model)
    assert lean_names(model) == BOTH - {"mlp"}
    assert not type(first).forward.__module__.startswith("rlhf_pipeline.")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"]])
def test_adapters(targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    plain = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model = copy.deepcopy(plain)
    use_lean_layers(model)
    assert lean_names(model) == BOTH
    (ours, our_gradients), (theirs, their_gradients) = results(model), results(plain)
    assert torch.equal(ours, theirs) and our_gradients.keys() == their_gradients.keys() and our_gradients
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6)


def test_a_map_that_is_watched_is_called_as_a_module() -> None:
    model = tiny("llama")
    use_lean_layers(model)
    seen = []
    model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(lambda *_: seen.append(1))
    results(model)
    assert seen == [1]
