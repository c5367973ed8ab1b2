#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: on GPT-2, an adapter on `lm_head` with `ensure_weight_tying` is lost when it is loaded.
#
# With tied weights, peft advises `ensure_weight_tying=True` when `lm_head` gets an adapter. It then puts one adapter into
# the head and its transpose into the embedding. It writes the embedding's name alone into `target_modules`, but stores the
# adapter's weights of both. When it loads them, it looks for the embedding by the name `embed_tokens`. GPT-2's is called
# `transformer.wte`: `PeftModel.from_pretrained` makes an adapter in the embedding only, leaves out the stored weights of the
# head, and the model computes something else. There is no error and no word on the weights that were left out; the one
# warning says that no tied module is targeted. On a tied Llama the loaded model is the saved one.
#
# What one would expect: the outputs that the model had before it was saved, or an error.
#
# Output seen:
#   llama: target_modules ['model.embed_tokens'], weights of the head stored 2, difference of logits after loading 0.0
#   gpt2:  target_modules ['transformer.wte'], weights of the head stored 2, difference of logits after loading > 1: True
#   gpt2, warnings about the adapter on loading: ['no tied modules are added in either `modules_to_save` or `target_modules`']
#
# Exit code 0: the behaviour is as described. Another one: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import json
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ENDS = {"bos_token_id": 0, "eos_token_id": 1}
MODELS = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True, **ENDS,
        ),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, **ENDS)),
}
ids = torch.arange(8)[None]


def difference(kind, config):
    """target_modules and weights of the head as saved, warnings on loading, and the largest difference of logits."""

    def base():
        torch.manual_seed(0)
        return kind(config)

    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(base(), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        before = model(input_ids=ids).logits
    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        after = loaded(input_ids=ids).logits
    targets = sorted(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
    head = [name for name in load_file(folder / "adapter_model.safetensors") if "lm_head" in name]
    told = [str(one.message).partition(", but ")[2] for one in said if "tying" in str(one.message)]
    assert not [one for one in said if "key" in str(one.message)], "there is a warning of left-out keys now"
    return targets, len(head), told, float((after - before).abs().max())


seen = {name: difference(*model) for name, model in MODELS.items()}
for name, (targets, head, told, off) in seen.items():
    shown = off if off < 1 else f"> 1: {off > 1}"
    print(f"{name + ':':<6} target_modules {targets}, weights of the head stored {head}, "
          f"difference of logits after loading {shown}")
print("gpt2, warnings about the adapter on loading:", seen["gpt2"][2])
assert seen["llama"][:3] == (["model.embed_tokens"], 2, []) and seen["llama"][3] < 1e-5, "changed: llama"
assert seen["gpt2"][:2] == (["transformer.wte"], 2) and seen["gpt2"][3] > 1, "changed: gpt2"
PY
echo "as described"
