"""`freeze_layers` of ppo: what stays as it is, what is trained, and what is refused."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.models.freezing import freeze_layers
from tests.conftest import stopped_before
from tests.rollout.conftest import tiny_llama


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_embeddings_and_first_layers_are_frozen():
    model = tiny_llama(num_hidden_layers=3)
    every = trained(model)
    freeze_layers(model, 2)
    frozen = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    assert trained(model) == {name for name in every if not name.startswith(frozen)}


def test_an_embedding_that_is_the_head_is_trained():
    model = tiny_llama(num_hidden_layers=2, tie_word_embeddings=True)
    freeze_layers(model, 1)
    assert "model.embed_tokens.weight" in trained(model)
    assert not any(name.startswith("model.layers.0.") for name in trained(model))


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="found 3, but LlamaForCausalLM has 2 layers; expected at most 2"):
        freeze_layers(tiny_llama(num_hidden_layers=2), 3)


@pytest.mark.check
def test_a_run_keeps_them_costs_less_and_resumes_bit_for_bit(lab):
    changes = {"freeze_layers": 1, "max_steps": 3, "save_steps": 1}
    whole = lab.run("ppo", output_name="whole", **changes)
    start, weights = lab.weights("sft"), lab.weights(whole.model)
    changed = {name for name in weights if not torch.equal(start[name], weights[name])}
    assert changed == {"lm_head.weight", "model.norm.weight"}
    plain = lab.run("ppo", output_name="plain", max_steps=1)
    assert lab.run("ppo", output_name="one", freeze_layers=1, max_steps=1).cost["flops"] < plain.cost["flops"]
    with stopped_before(3):
        lab.run("ppo", **changes)
    resumed = lab.run("ppo", **changes)
    found = lab.weights(resumed.model)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert lab.rows(resumed.run) == lab.rows(whole.run)
