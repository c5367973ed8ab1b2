"""Models from a config alone or from a folder."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_pipeline.data import world
from rlhf_pipeline.errors import BadInput, ConfigError
from rlhf_pipeline.models.loading import init_causal_lm, load_causal_lm, load_sequence_classifier, save_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_random_weights_follow_the_seed_and_special_ids_the_tokenizer():
    one, same, other = (init_causal_lm(LLAMA, world.tokenizer(), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.config.vocab_size == 32
    assert (one.config.pad_token_id, one.config.eos_token_id) == (world.PAD_ID, world.EOS_ID)
    assert one.config.bos_token_id is None


def test_an_unknown_architecture_or_key_is_named_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown architecture 'lama'.*did you mean.*'llama'"):
        init_causal_lm({"model_type": "lama"}, world.tokenizer(), seed=0)
    with pytest.raises(ConfigError, match=r"hiden_size.*did you mean 'hidden_size'"):
        init_causal_lm({"model_type": "llama", "hiden_size": 16}, world.tokenizer(), seed=0)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadInput, match="cannot load it as a model"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weights_survive_a_save_in_the_dtype_asked_for(tmp_path, dtype):
    model = init_causal_lm(LLAMA, world.tokenizer(), seed=0)
    save_model(model, world.tokenizer(), tmp_path / "lm")
    loaded = load_causal_lm(tmp_path / "lm", dtype=dtype)
    kind = getattr(torch, dtype)
    assert all(torch.equal(a.to(kind), b) for a, b in zip(model.parameters(), loaded.parameters()))


def test_an_added_token_gets_a_row_and_the_others_keep_theirs(tmp_path):
    save_model(init_causal_lm(LLAMA, world.tokenizer(), seed=0), world.tokenizer(), tmp_path / "lm")
    larger = world.tokenizer()
    larger.add_tokens(["splendid"])
    model = load_causal_lm(tmp_path / "lm", tokenizer=larger)
    before = load_causal_lm(tmp_path / "lm").get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 33
    assert torch.equal(model.get_input_embeddings().weight[:32], before)


def saved(tmp_path, **changes):
    save_model(init_causal_lm(LLAMA, world.tokenizer(), seed=1), world.tokenizer(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path


@pytest.mark.parametrize("load", [load_causal_lm, load_sequence_classifier])
def test_quantised_weights_are_refused_by_name(tmp_path, load):
    folder = saved(tmp_path, quantization_config={"quant_method": "finegrained_fp8"})
    with pytest.raises(BadInput, match="quantization_config: quantised weights cannot be loaded yet"):
        load(folder)


def test_the_code_of_experts_that_a_folder_asks_for_is_not_taken(tmp_path):
    model = load_causal_lm(saved(tmp_path, experts_implementation="evil/kernel"))
    assert model.config._experts_implementation != "evil/kernel"
