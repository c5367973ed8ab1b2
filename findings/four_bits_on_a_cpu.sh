#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0: on a CPU a layer in 4 bits is another function in evaluation than in training, and
# a weight whose rows are not whole blocks of 64 is dequantised wrongly, both in silence.
#
# 1. Linear4bit.forward in evaluation without gradients packs its weight anew and computes in bfloat16, whatever its
#    compute_dtype, if the CPU has AVX512-BF16. So a policy's log-probabilities while it samples (and those of a frozen
#    reference) differ from those that it is trained with: PPO's first ratio is not 1, DPO's first margin is not 0.
# 2. quantize_4bit counts blocks of 64 over the whole weight; the CPU code of dequantize_4bit counts them in each row. For
#    a weight of 16 x 96 the two disagree: relative error .28 instead of .09.
#
# What one would expect: one function in both modes; what was quantised, or an error for a shape that is not supported.
#
# Output seen (AVX512-BF16):
#   relative error of 16 x 64 and 16 x 96:   0.09 0.28
#   of 16 x 96 by the 16 constants, by hand: 0.09
#   training minus evaluation, fp32:         over 1e-4: True
#
# Exit code 0: the behaviour is as described. Another one: it has changed. Without AVX512-BF16 the first part is left out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 numpy
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit
from bitsandbytes.nn import Linear4bit

torch.manual_seed(0)


def error(found, weight):
    return float((found - weight).norm() / weight.norm())


errors = []
for columns in (64, 96):
    weight = torch.randn(16, columns)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    errors.append(error(dequantize_4bit(packed, state), weight))
blocks = weight.reshape(-1, 64)
scale = blocks.abs().amax(1, keepdim=True)
nearest = ((blocks / scale)[..., None] - state.code).abs().argmin(-1)
by_hand = error((state.code[nearest] * scale).reshape(weight.shape), weight)
print("relative error of 16 x 64 and 16 x 96:  ", *(f"{value:.2f}" for value in errors))
print("of 16 x 96 by the 16 constants, by hand:", f"{by_hand:.2f}")
assert errors[0] < 0.12 and by_hand < 0.12 and errors[1] > 0.2, "changed"
if has_avx512bf16():
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    states = torch.randn(5, 64)
    with torch.no_grad():
        apart = float((layer.train()(states) - layer.eval()(states)).abs().max())
    print("training minus evaluation, fp32:        ", "over 1e-4:", apart > 1e-4)
    assert apart > 1e-4, "changed"
PY
echo "as described"
