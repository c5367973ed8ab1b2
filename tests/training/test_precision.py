"""bf16: auto, and activations that are computed again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.models.modules import make_actor_critic
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.training import precision
from rlhf_pipeline.training.precision import checkpoint_activations, has_fast_bf16, uses_bf16

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("fast", [True, False])
def test_auto_asks_the_machine(monkeypatch, fast):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda use_cpu: fast)
    found = [uses_bf16(SimpleNamespace(bf16=value, use_cpu=True)) for value in (True, False, "auto")]
    assert found == [True, False, fast]
    assert not uses_bf16(SimpleNamespace())


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_is_fast_where_it_has_the_instructions(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert has_fast_bf16(use_cpu=True) is supported


def test_auto_is_said_and_kept_in_the_config(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda use_cpu: True)
    lab = tiny.copy(tmp_path / "home")
    result = lab.run("dpo", output_name="auto", bf16="auto", max_steps=1)
    assert "bf16 auto: on" in (lab.home / "runs" / result.run / "log.txt").read_text()
    assert "bf16: auto" in (lab.home / "runs" / result.run / "config.yaml").read_text()


def saved_bytes(module, batch) -> int:
    """What a forward pass keeps for the backward pass, besides parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = module(batch)
    (scores.logprobs.sum() + scores.values.sum()).backward()
    return sum(kept.values())


def test_a_layer_whose_forward_another_package_has_replaced_is_not_checkpointed(monkeypatch):
    """transformers then keeps all activations in silence: findings/checkpointing_off_by_class_patch.sh."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    layer = type(model.model.layers[0])
    checkpoint_activations(model)
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    with pytest.raises(ConfigError, match=r"another package has replaced LlamaDecoderLayer\.forward"):
        checkpoint_activations(model)


@pytest.mark.parametrize("value_init", ["sft", "shared"])
def test_checkpointing_keeps_less_and_changes_no_gradient(value_init):
    found, kept = [], []
    pair = Example(list(range(1, 30)), [list(range(4, 20)), list(range(7, 30))], [True, True], "k", "w")
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        module = make_actor_critic(model, inspect_model(model), value_init).train()
        torch.nn.init.normal_(module.value_head.weight, generator=torch.Generator().manual_seed(1))
        if checkpointing:
            checkpoint_activations(module)
        kept.append(saved_bytes(module, pack([pair], layout="flat", flat_from=0)))
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert kept[1] < 0.5 * kept[0]


class Layers:
    """How often the attention of each decoder layer runs with gradients: once a forward pass of the layer."""

    def __init__(self, monkeypatch):
        self.calls: dict[int, int] = {}
        self.kept = []  # keeps ids from being given away
        forward = LlamaAttention.forward

        def run(attention, *args, **options):
            if torch.is_grad_enabled():
                self.kept.append(attention)
                self.calls[id(attention)] = self.calls.get(id(attention), 0) + 1
            return forward(attention, *args, **options)

        monkeypatch.setattr(LlamaAttention, "forward", run)


ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 16}
ONE_ROLLOUT = {**ONE_STEP, "num_ppo_epochs": 1, "num_mini_batches": 1}
ROLES = {  # stage, settings, models of one layer that are trained
    "sft": ("sft", ONE_STEP, 1),
    "train-rm": ("train-rm", ONE_STEP, 1),
    "dpo": ("dpo", ONE_STEP, 1),
    "ppo, critic of the reward model": ("ppo", {**ONE_ROLLOUT, "value_init": "reward_model"}, 2),
    "ppo, critic of the actor": ("ppo", {**ONE_ROLLOUT, "value_init": "sft"}, 2),
    "ppo, shared": ("ppo", {**ONE_ROLLOUT, "value_init": "shared"}, 1),
    "sft by TRL": ("sft", {**ONE_STEP, "engine": "trl"}, 1),
    "train-rm by TRL": ("train-rm", {**ONE_STEP, "engine": "trl"}, 1),
    "dpo by TRL": ("dpo", {**ONE_STEP, "engine": "trl"}, 1),
}


@pytest.mark.parametrize("name", ROLES)
def test_every_layer_that_is_trained_is_computed_again(lab, monkeypatch, name):
    """One step of one micro-batch: each layer runs once forward, and once more in the backward pass."""
    stage, settings, models = ROLES[name]
    for checkpointing, runs in ((False, 1), (True, 2)):
        with monkeypatch.context() as patch:
            layers = Layers(patch)
            lab.run(stage, **settings, gradient_checkpointing=checkpointing, output_name=f"with-{checkpointing}")
        assert list(layers.calls.values()) == [runs] * models
