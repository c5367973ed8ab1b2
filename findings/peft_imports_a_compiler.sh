#!/usr/bin/env bash
# peft 0.21.2 beside bitsandbytes 0.50.2: `import peft` imports PyTorch's compiler, TorchInductor, though nothing is compiled.
#
# peft imports bitsandbytes wherever it is installed, also if no weight is in 4 or 8 bits. bitsandbytes decorates four functions
# of its default backend with torch.compile when it is imported. torch.compile compiles nothing until such a function is called, but
# it looks up its backend at once, and that imports torch._inductor.compile_fx with sympy's printers and templates: a second or more
# before anything is trained, in every process that asks peft whether a model has an adapter.
#
# What one would expect: an import costs what it uses; a decorator that compiles later imports its compiler later. What helps: to
# import peft only where a model has adapters, or an environment without bitsandbytes.
#
# Output seen (whether torch._inductor.compile_fx is imported behind torch, transformers and peft):
#   with bitsandbytes:    compile_fx True
#   without bitsandbytes: compile_fx False
#
# Exit code 0: the behaviour is as described. Another one: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 bitsandbytes==0.50.2
cd "$folder"
cat >script.py <<'PY'
import sys

import torch
import transformers  # noqa: F401
from transformers import PreTrainedModel  # noqa: F401

assert "torch._inductor.compile_fx" not in sys.modules, "torch and transformers import the compiler themselves"
import peft  # noqa: E402, F401

print("compile_fx", "torch._inductor.compile_fx" in sys.modules)
PY
with=$("$folder/env/bin/python" script.py 2>/dev/null | tail -n 1)
"$folder/env/bin/python" -m pip uninstall --quiet --yes bitsandbytes
without=$("$folder/env/bin/python" script.py 2>/dev/null | tail -n 1)
echo "with bitsandbytes:    $with"
echo "without bitsandbytes: $without"
[ "$with" = "compile_fx True" ] && [ "$without" = "compile_fx False" ] && echo "as described"
