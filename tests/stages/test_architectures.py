"""Ten architectures as others publish them run three steps of each stage."""

from __future__ import annotations

import math

import pytest

from rlhf_pipeline.data import world

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LAYERS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
PICTURES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
ALONE = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
ARCHITECTURES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "mistral": SIZES | {"sliding_window": 4},
    "gpt_neox": {**ALONE, "intermediate_size": 32, "max_position_embeddings": 64, "attention_dropout": 0.1},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gemma3": {"text_config": SIZES | LAYERS, "vision_config": PICTURES, "mm_tokens_per_image": 4},
    "phi3": SIZES | {"resid_pdrop": 0.1, "sliding_window": 4},
    "olmo2": {key: value for key, value in SIZES.items() if key != "head_dim"},
    "opt": {**ALONE, "word_embed_proj_dim": 16, "ffn_dim": 32, "max_position_embeddings": 64, "layerdrop": 0.3},
}
METHODS = {"full": {}, "lora": {"use_peft": True, "lora_r": 2, "lora_target_modules": ["all-linear"]}}


def published(model_type: str, folder) -> str:
    """A random model in the layout of the Hugging Face hub, with the tokenizer of the built-in world."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = world.tokenizer()
    special = {"vocab_size": len(tokenizer), "initializer_range": 0.25, "pad_token_id": world.PAD_ID}
    special |= {"eos_token_id": world.EOS_ID, "bos_token_id": None}
    values = dict(ARCHITECTURES[model_type])
    if "text_config" in values:
        values["text_config"] = values["text_config"] | special
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **special, **values))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.check
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_three_steps_of_each_stage(lab, tmp_path, model_type, method):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    steps = {"max_steps": 3, **METHODS[method]}
    start = published(model_type, tmp_path / "published")
    demonstrations = {"dataset_name": "world:verdicts", "max_train_samples": 64}
    tuned = lab.run("sft", model_name_or_path=start, output_name="tuned", **demonstrations, **steps)
    scored = lab.run("train-rm", model_name_or_path="tuned", output_name="scored", **steps)
    dpo = lab.run("dpo", model_name_or_path="tuned", **steps)
    ppo = lab.run("ppo", model_name_or_path="tuned", reward_model_path="scored", **steps)

    first = lab.rows(dpo.run)[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["logps/chosen_minus_reference"]) < 1e-5
    first = lab.rows(ppo.run)[0]
    assert abs(first["objective/kl"]) < 1e-5 and first["first_minibatch/ratio_error"] < 1e-5
    if method == "full":
        for result in (tuned, dpo, ppo):
            AutoModelForCausalLM.from_pretrained(result.path)
        AutoModelForSequenceClassification.from_pretrained(scored.path)
    assert "batches packed without padding" in (lab.home / "runs" / tuned.run / "log.txt").read_text()
