#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: where PAD is EOS, EOS is not trained as an input, and no score is read at it, in silence.
#
# Many published models have one token for PAD and EOS, and recipes set `pad_token = eos_token` for those without PAD.
# 1. Llama (and most others) makes nn.Embedding(..., padding_idx=config.pad_token_id). Torch gives that row no gradient. So
#    the embedding of EOS, which is the end of every turn in ChatML, stays as it was, unless the output head shares it.
# 2. A sequence classifier reads its score at the last token that is not PAD. So a text that ends in EOS and the same text
#    without EOS have one score: a reward model cannot tell a response that ended from one that was cut.
#
# What one would expect: a gradient for every token that the loss depends on; two scores for two texts; or a warning.
#
# Output seen:
#   gradient of the embedding of EOS:  PAD = EOS 0.0, another PAD > 0: True
#   the loss depends on that row:      True
#   scores with and without EOS equal: PAD = EOS True, another PAD False
#
# Exit code 0: the behaviour is as described. Another one: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

EOS, OTHER = 2, 0
SIZES = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
text = torch.tensor([[3, 4, EOS]])


def make(kind, pad):
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES, pad_token_id=pad, eos_token_id=EOS, bos_token_id=None, num_labels=1)).eval()


def loss(model):
    ids = torch.cat([text, torch.tensor([[5, 6]])], 1)  # EOS within a conversation
    return model(input_ids=ids, labels=ids).loss


gradients, equal = {}, {}
for name, pad in (("PAD = EOS", EOS), ("another PAD", OTHER)):
    model = make(LlamaForCausalLM, pad)
    loss(model).backward()
    gradients[name] = float(model.model.embed_tokens.weight.grad[EOS].abs().max())
    scorer = make(LlamaForSequenceClassification, pad)
    with torch.no_grad():
        equal[name] = bool(torch.allclose(scorer(input_ids=text).logits, scorer(input_ids=text[:, :-1]).logits))
model = make(LlamaForCausalLM, EOS)
with torch.no_grad():
    before = loss(model)
    model.model.embed_tokens.weight[EOS] += 1
    depends = bool((loss(model) - before).abs() > 1e-5)
print("gradient of the embedding of EOS: ", f"PAD = EOS {gradients['PAD = EOS']}, another PAD > 0: {gradients['another PAD'] > 0}")
print("the loss depends on that row:     ", depends)
print("scores with and without EOS equal:", f"PAD = EOS {equal['PAD = EOS']}, another PAD {equal['another PAD']}")
assert gradients["PAD = EOS"] == 0.0 and gradients["another PAD"] > 0 and depends, "changed"
assert equal == {"PAD = EOS": True, "another PAD": False}, "changed"
PY
echo "as described"
