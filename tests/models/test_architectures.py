"""Models as others publish them: composite, with windows, noise, heads of their own. Truth: transformers alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models import probe
from rlhf_pipeline.models.forward import Reader, completion_logprobs
from rlhf_pipeline.models.loading import init_causal_lm, init_reward_model, load_causal_lm, save_model
from rlhf_pipeline.models.noise import require_no_noise
from rlhf_pipeline.models.selfcheck import inspect_model, inspect_reward_model, read_reward_model

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
PICTURES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
EXPERTS = {"intermediate_size_mlp": 32, "num_local_experts": 2, "interleave_moe_layer_step": 1}
CHUNKED = {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"]}
GPT_NEO = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}
MODELS = {
    "gemma3": ({"text_config": TEXT | SLIDING, "vision_config": PICTURES, "mm_tokens_per_image": 4}, "flat"),
    "llama4_text": (TEXT | EXPERTS | CHUNKED, "rows"),
    "gpt_neo": ({key: TEXT[key] for key in ("vocab_size", "hidden_size", "eos_token_id")} | GPT_NEO, "rows"),
}


def make(model_type: str, values: dict, *, scorer: bool = False):
    """A random model whose norms are not 1; with `scorer` a sequence classifier with one label."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.set_num_threads(1)
    config = AutoConfig.for_model(model_type, **values)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = (AutoModelForSequenceClassification if scorer else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def long_examples() -> list[Example]:
    """Sequences of 23 to 95 tokens; PAD (0) is among them."""
    draw = torch.Generator().manual_seed(3)
    sizes = [(20, (3, 60)), (40, (55,)), (5, (40, 33))]
    rows = [[torch.randint(0, 32, (n,), generator=draw).tolist() for n in (p, *c)] for p, c in sizes]
    return [Example(p, c, [True] * len(c), prompt_key=str(p), where="row") for p, *c in rows]


@torch.no_grad()
def plain(model, examples: list[Example]) -> torch.Tensor:
    """Token log-probabilities by transformers, one unpadded sequence at a time."""
    pieces = []
    for example in examples:
        for completion in example.completions:
            ids, start = torch.tensor([example.prompt_ids + completion]), len(example.prompt_ids)
            table = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
            pieces.append(table[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]])
    return torch.cat(pieces).float()


@pytest.mark.parametrize("model_type", MODELS)
def test_sequences_longer_than_the_windows_are_read_as_by_the_model_itself(model_type):
    """Composite models (the window is in the text config), chunks, and windows under another name."""
    values, layout = MODELS[model_type]
    model, examples = make(model_type, values), long_examples()
    expected = plain(model, examples)
    reader = inspect_model(model)
    assert reader.layout == layout
    with torch.no_grad():
        found = completion_logprobs(model, reader, pack(examples, layout=layout, flat_from=0))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        if layout == "flat":
            found = completion_logprobs(model, Reader("trees"), pack(examples, row_length=100))[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_scores_of_a_composite_model_are_its_own():
    model, examples = make("gemma3", MODELS["gemma3"][0], scorer=True), long_examples()
    with torch.no_grad():
        rows = [e.prompt_ids + c for e in examples for c in e.completions]
        expected = torch.cat([model(input_ids=torch.tensor([[*ids, 5]])).logits[0] for ids in rows])
        scorer = read_reward_model(model)
        for example in examples:
            example.completions[:] = [[*completion, 5] for completion in example.completions]
        found = scorer(pack(examples, layout=scorer.reader.layout, flat_from=0))
    assert scorer.reader.layout == "flat"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_self_check_looks_past_the_window(monkeypatch):
    """A model that forgets its window of 512 in our masks: the probe of at most 11 tokens shows it nevertheless."""
    values = {**TEXT, "sliding_window": 512}
    assert inspect_model(make("mistral", values)).layout == "flat"
    monkeypatch.setattr("rlhf_pipeline.models.forward.TreeMask.of", without_window())
    model = make("mistral", values)
    assert inspect_model(model).layout == "trees" and model.config.sliding_window == 512


def without_window():
    from rlhf_pipeline.models.tree_attention import TreeMask

    return lambda trees, window, dtype, device, of=TreeMask.of: of(trees, None, dtype, device)


def test_the_probe_has_pad_inside_and_no_completion_ends_in_it():
    model = make("llama", TEXT | {"pad_token_id": 7})
    model.config.pad_token_id = 7
    examples = probe.probe_examples(model)
    assert [7 in e.prompt_ids for e in examples] == [True, False]
    assert [[7 in c for c in e.completions] for e in examples] == [[True, True], [False, False]]
    assert all(c[-1] != 7 for e in examples for c in e.completions)
    longest = max(len(e.prompt_ids) + len(c) for e in examples for c in e.completions)
    assert longest == 11 > probe.WINDOW


OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def test_dropped_layers_are_off_in_every_role(tmp_path):
    noisy = init_causal_lm(OPT | {"layerdrop": 0.3}, world.tokenizer(), seed=0, dropout=True)
    assert noisy.config.layerdrop == 0.3
    save_model(noisy, world.tokenizer(), tmp_path)
    assert load_causal_lm(tmp_path, dropout=True).config.layerdrop == 0.3
    ids = torch.arange(2, 12)[None]
    for model in (load_causal_lm(tmp_path), init_reward_model(tmp_path, world.tokenizer(), seed=0)):
        expected = model.eval()(input_ids=ids).logits
        assert all(torch.equal(model.train()(input_ids=ids).logits, expected) for _ in range(8))


@pytest.mark.parametrize("key", ["router_jitter_noise", "input_jitter_noise"])
def test_router_noise_is_off(tmp_path, key):
    mixture = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"model_type": "phimoe", **mixture, "num_key_value_heads": 2, "num_local_experts": 2, key: 0.1}
    save_model(init_causal_lm(values, world.tokenizer(), seed=0, dropout=True), world.tokenizer(), tmp_path)
    assert getattr(load_causal_lm(tmp_path).config, key) == 0


@pytest.mark.check
def test_a_router_loss_is_not_computed_and_its_key_is_published(tmp_path):
    """transformers computes it in each forward pass, and fails at it when it decodes padded prompts with a cache."""
    values = TEXT | {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    make("mixtral", values).save_pretrained(tmp_path / "first")
    model = load_causal_lm(tmp_path / "first")
    assert inspect_model(model).decodes
    assert model(input_ids=torch.arange(2, 6)[None]).router_logits is None
    assert read_reward_model(init_reward_model(tmp_path / "first", world.tokenizer(), seed=0)).reader.layout == "flat"
    save_model(model, world.tokenizer(), tmp_path / "second")
    assert not model.config.output_router_logits
    for folder in ("first", "second"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["output_router_logits"] is True


def test_noise_that_no_key_of_the_config_switches_off_is_refused_by_name():
    model = init_causal_lm(OPT, world.tokenizer(), seed=0)
    before = torch.get_rng_state()
    require_no_noise(model.train())
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.model.decoder.layerdrop = 0.3
    with pytest.raises(BadInput, match="OPTForCausalLM: found other logits in training mode than in evaluation mode"):
        require_no_noise(model)


def test_a_head_with_layers_of_its_own_is_refused_as_a_reward_model():
    """ModernBERT's decoder has a dense layer, an activation and a norm before its score."""
    values = {key: value for key, value in TEXT.items() if key != "bos_token_id"} | {"local_attention": 8}
    model = make("modernbert-decoder", values, scorer=True)
    with pytest.raises(BadInput, match="ModernBertDecoderForSequenceClassification: found packed scores that differ"):
        inspect_reward_model(model)


def test_weights_that_the_files_lack_are_named(tmp_path):
    save_model(init_causal_lm(OPT, world.tokenizer(), seed=0), world.tokenizer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = "model.decoder.layers.1.fc1.weight"
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"lack weights of OPTForCausalLM: {gone}; expected all of them"):
        load_causal_lm(tmp_path)
    with pytest.raises(BadInput, match=f"lack weights of OPTForSequenceClassification: {gone};"):
        init_reward_model(tmp_path, world.tokenizer(), seed=0)
