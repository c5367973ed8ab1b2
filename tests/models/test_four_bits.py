"""Linear layers in 4 bits: what they compute, by the table of Dettmers et al. 2023, and what is copied and merged."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.models.adapters import add_adapter, on_same_weights, remove_adapters, whole_trunk
from rlhf_pipeline.models.four_bits import dequantise, in_four_bits
from rlhf_pipeline.models.loading import load_causal_lm
from rlhf_pipeline.models.selfcheck import inspect_model

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]

IDS = torch.randint(2, 32, (2, 7), generator=torch.Generator().manual_seed(3))
# Appendix E of the paper; FP4: sign, two bits of exponent, one of mantissa, scaled to 1.
POSITIVE = [0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
POSITIVE += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
NEGATIVE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NEGATIVE += [-0.18477343022823334, -0.09105003625154495]
FP4 = [0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0]
WIDE = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32},
    "gpt2": {"n_embd": 64, "hidden_size": 64},
}
TABLES = {"nf4": NEGATIVE + POSITIVE, "fp4": FP4 + [-value for value in FP4]}


def rounded(weight, table):
    """Each weight by the nearest of 16 constants, times the largest size in its block of 64."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - torch.tensor(table)).abs().argmin(-1)
    return (torch.tensor(table)[nearest] * scale).reshape(weight.shape)


def settings(**changes):
    given = {"model_name_or_path": "org/name", "dataset_name": "org/rows", "learning_rate": 1e-3, "output_name": "out"}
    return load_config("dpo", None, extra={**given, "use_peft": True, "lora_r": 4, **changes}).config


@pytest.fixture
def in_4_bits(make_model, tmp_path):
    def load(name, how, **options):
        plain = make_model(name, **WIDE[name.split("-")[0]])
        plain.save_pretrained(tmp_path / name)
        return plain, load_causal_lm(tmp_path / name, four_bits=how, **options).requires_grad_(False)

    return load


@pytest.mark.parametrize("kind", TABLES)
def test_a_layer_multiplies_by_its_rounded_weights_in_training_and_in_evaluation(in_4_bits, kind):
    plain, model = in_4_bits("llama", FourBits(kind))
    weight = rounded(plain.model.layers[0].mlp.down_proj.weight.detach(), TABLES[kind])
    layer, states = model.model.layers[0].mlp.down_proj, torch.randn(3, 5, 128, requires_grad=True)
    for mode in (True, False):
        layer.train(mode)
        states.grad = None
        output = layer(states)
        torch.testing.assert_close(output, states @ weight.T, atol=1e-5, rtol=1e-5)
        output.sum().backward()
        torch.testing.assert_close(states.grad, weight.sum(0).expand_as(states), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            assert torch.equal(layer(states.detach()), output)


@pytest.mark.check
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@torch.no_grad()
def test_embeddings_and_heads_stay_and_all_else_is_rounded(in_4_bits, name):
    """The model computes what plain transformers computes on the rounded weights; GPT-2's are transposed."""
    plain, model = in_4_bits(name, FourBits())
    for path, module in plain.named_modules():
        if in_four_bits(model.get_submodule(path)):
            turned = type(module).__name__ == "Conv1D"
            weight = rounded(module.weight.T if turned else module.weight, TABLES["nf4"])
            module.weight.copy_(weight.T if turned else weight)
        else:
            assert "Linear" not in type(module).__name__ or path == "lm_head"
    expected = plain.eval()(input_ids=IDS).logits
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert inspect_model(model).layout == inspect_model(plain).layout  # the packed forward reads it as it reads others
    dequantise(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}


@pytest.mark.check
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"lora_target_modules": "all-linear"}])
@torch.no_grad()
def test_an_adapter_is_merged_into_the_rounded_weights(in_4_bits, name, kind):
    """For a critic that is trained whole; the model that it is copied from stays in 4 bits."""
    _, model = in_4_bits(name, FourBits(nested=True))
    before = model.eval()(input_ids=IDS).logits
    add_adapter(model, settings(**kind), "base")
    torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-5, rtol=1e-5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    hidden = model.base_model(input_ids=IDS).last_hidden_state
    trunk = whole_trunk(model)
    torch.testing.assert_close(trunk(input_ids=IDS).last_hidden_state, hidden, atol=1e-4, rtol=1e-4)
    assert all(weight.requires_grad and weight.is_floating_point() for weight in trunk.parameters())
    assert torch.equal(model.base_model(input_ids=IDS).last_hidden_state, hidden)


@pytest.mark.check
@torch.no_grad()
def test_a_second_model_on_the_same_weights_holds_no_scale_twice(in_4_bits):
    _, model = in_4_bits("llama", FourBits(nested=True))
    copied = on_same_weights(model)
    add_adapter(copied, settings(), "base")
    remove_adapters(copied, merge=False)
    for one, other in zip(model.modules(), copied.modules(), strict=True):
        if in_four_bits(one):
            assert other.weight is one.weight and other.quant_state is one.weight.quant_state
    apart = copy.deepcopy(model)
    assert torch.equal(apart(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.check
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@torch.no_grad()
def test_it_computes_in_the_number_type_of_the_model(in_4_bits, dtype):
    _, model = in_4_bits("llama", FourBits(), dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert model(input_ids=IDS).logits.dtype == expected
    assert {module.compute_dtype for module in model.modules() if in_four_bits(module)} == {expected}
    assert torch.equal(model.train()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
