"""Compare this PPO with its peer, trl.experimental.ppo of TRL 1.12.0 (the last release that has one).

    .venv/bin/python scripts/parity_ppo.py [--environment DIRECTORY] [--python INTERPRETER] [--output FILE.json]

Creates the peer's environment (once), one tiny model of every role with random weights, and eight fixed rollouts. Runs
the peer's real `PPOTrainer.train()` on them in several settings (parity_ppo_peer.py), and computes the same with this
package (parity_ppo_ours.py, parity_ppo_compare.py). Writes both and their differences to
tests/rollout/data/parity_ppo.json, with the weights and the peer's gradients in the same folder.
tests/rollout/test_parity_ppo.py computes this package's side again; docs/parity_ppo.md describes the results. The exit
code is 1 if quantities that should agree do not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from parity_ppo_compare import compare
from parity_ppo_ours import Comparison, nine_digits
from safetensors.torch import load_file, save, save_file

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "tests/rollout/data/parity_ppo.json"
ENVIRONMENT = ROOT / ".peer/trl-1.12"
PINS = (
    "trl==1.12.0",
    "torch==2.13.0",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "peft==0.21.2",
)
SEED = 1
PAD, STOP, OTHER_EOS, RESPONSE_LENGTH = 0, 1, 2, 8
MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": STOP,
}
# Per rollout: tokens of the prompt, tokens of the response, whether it ended. The first is only the stop token,
# the second ends with its last possible token.
SHAPES = (
    (3, 1, True),
    (6, 8, True),
    (1, 8, False),
    (4, 8, False),
    (2, 3, True),
    (5, 5, True),
    (3, 7, True),
    (6, 4, True),
)
ARGUMENTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "learning_rate": 0.03,
    "temperature": 1.0,
    "kl_coef": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "whiten_rewards": False,
    "missing_eos_penalty": None,
    "stop_token_id": STOP,
}
ESTIMATES = ("rewards", "returns", "advantages_before", "advantages")
ALL = ("logprobs", "ref_logprobs", "kl", "values", "scores", "sequence_lengths", *ESTIMATES)


def case(
    keep: Sequence[str], *, rollouts="fixed", critic="reward", eos_id=STOP, keep_steps=0, **changes: Any
) -> dict[str, Any]:
    """A setting of the peer. keep: tensors to save; keep_steps: optimizer steps whose gradients are saved."""
    return {
        "rollouts": rollouts,
        "critic": critic,
        "eos_id": eos_id,
        "dataset_batches": 2,
        "keep": list(keep),
        "keep_steps": keep_steps,
        "arguments": {**ARGUMENTS, **changes},
    }


CASES = {
    "defaults": case(ALL, keep_steps=2, num_ppo_epochs=2),
    "own critic": case(ALL, critic="critic", temperature=0.7),
    "lambda 1": case(ESTIMATES, critic="critic", lam=1.0),
    "discounted": case(ESTIMATES, critic="critic", gamma=0.9, lam=0.8),
    "micro-batches": case(
        ("advantages",),
        keep_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_mini_batches=2,
    ),
    "reward whitening": case(("rewards_before", "rewards"), whiten_rewards=True),
    "other stop token": case(("scores",), eos_id=OTHER_EOS, missing_eos_penalty=1.0),
    "sampled pad": case(("logprobs", "sequence_lengths", "scores"), rollouts="sampled pad"),
}
STEP_COUNTS = [
    {
        "dataset_batches": batches,
        "arguments": {
            **ARGUMENTS,
            "num_ppo_epochs": 2,
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "num_mini_batches": minibatches,
        },
    }
    for batches, accumulation, minibatches in ((2, 4, 1), (2, 4, 2), (2, 4, 4), (2, 1, 1), (2, 1, 4), (1, 4, 1))
]


def make_rollouts() -> dict[str, list[dict[str, Any]]]:
    """The fixed rollouts, and the same with a pad token inside the seventh response."""
    draw = random.Random(SEED)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(OTHER_EOS + 1, MODEL["vocab_size"]) for _ in range(count)]

    rows = [
        {"prompt": tokens(prompt), "response": tokens(length - ended) + [STOP] * ended, "ended": ended}
        for prompt, length, ended in SHAPES
    ]
    rows[2]["response"][3] = OTHER_EOS  # an end-of-text token that is not the stop token, in a cut response
    padded = [{**row, "response": list(row["response"])} for row in rows]
    padded[6]["response"][2] = PAD
    return {"fixed": rows, "sampled pad": padded}


def make_weights() -> dict[str, torch.Tensor]:
    """Random weights of all roles; the reference is the actor plus noise."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    def weights(role: str, auto_class: Any, seed: int, **extra: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = auto_class.from_config(AutoConfig.for_model(**MODEL, **extra), dtype=torch.float32)
        return model.state_dict(prefix=f"{role}/")

    actor = weights("actor", AutoModelForCausalLM, SEED)
    noise = torch.Generator().manual_seed(SEED)
    reference = {
        name.replace("actor/", "reference/"): value + 0.1 * torch.randn(value.shape, generator=noise)
        for name, value in actor.items()
    }
    reward = weights("reward", AutoModelForSequenceClassification, SEED + 1, num_labels=1)
    critic = weights("critic", AutoModelForSequenceClassification, SEED + 2, num_labels=1)
    return {**actor, **reference, **reward, **critic}


def peer_python(environment: Path, interpreter: str) -> Path:
    """The interpreter of the peer's environment, which is created if it is missing or differs from PINS."""
    python, stamp = environment / "bin/python", environment / "pins.txt"
    wanted = "\n".join(PINS)
    if not (python.is_file() and stamp.is_file() and stamp.read_text() == wanted):
        print(f"creating the peer's environment in {environment}", file=sys.stderr)
        subprocess.run([interpreter, "-m", "venv", str(environment)], check=True)
        (environment / ".gitignore").write_text("*\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
        stamp.write_text(wanted)
    return python


def dump(document: dict[str, Any]) -> str:
    """JSON with one line for each list of numbers."""
    text = json.dumps(document, indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text) + "\n"


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    lines = ["| case | quantity | largest difference | tolerance | |", "| --- | --- | --- | --- | --- |"]
    for row in comparisons:
        limit = "differs on purpose" if row.tolerance is None else f"{row.tolerance:g}"
        lines.append(f"| {row.case} | {row.quantity} | {row.difference:.1e} | {limit} | {row.why} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="the peer's virtual environment")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that creates the environment")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    inputs = {
        "seed": SEED,
        "model": MODEL,
        "pad_id": PAD,
        "stop_id": STOP,
        "response_length": RESPONSE_LENGTH,
        "rollouts": make_rollouts(),
        "cases": CASES,
        "step_counts": STEP_COUNTS,
    }
    python = peer_python(options.environment, options.python)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "inputs.json").write_text(json.dumps(inputs))
        save_file(make_weights(), folder / "weights.safetensors")
        command = [str(python), str(Path(__file__).with_name("parity_ppo_peer.py"))]
        command += [str(folder / name) for name in ("inputs.json", "weights.safetensors", "out")]
        subprocess.run(command, check=True, stdout=sys.stderr)
        peer = json.loads((folder / "out/peer.json").read_text(), parse_float=nine_digits)
        weights = load_file(folder / "weights.safetensors") | load_file(folder / "out/peer.safetensors")
    document = {
        "provenance": {
            "command": ".venv/bin/python scripts/parity_ppo.py",
            "date": datetime.date.today().isoformat(),
            "peer": {"pins": list(PINS), **peer.pop("versions")},
            "ours": {
                "rlhf_pipeline": version("rlhf-pipeline"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": version("transformers"),
            },
        },
        "inputs": inputs,
        "peer": peer,
    }
    comparisons = compare(document, weights)
    document["comparisons"] = [row.as_dict() for row in comparisons]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(dump(document))
    options.output.with_suffix(".safetensors").write_bytes(save(weights))
    print(table(comparisons))
    failed = [row for row in comparisons if not row.agrees]
    for row in failed:
        print(f"does not agree: {row.case}: {row.quantity}: {row.difference:.3g} > {row.tolerance:g}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
