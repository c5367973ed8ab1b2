"""The record of a run that stopped at a number which is not finite.

runs/<run-id>/failure/
    failure.json        the figure, the update, the rows with their texts and token ids, the last metrics
    batch.safetensors   the packed micro-batches that hold the rows: <number>.<tensor>

A run with a `failure/` is blocked. Once the resumed run has passed the failed update, the folder is renamed to
failure-1/ (the next one to failure-2/), where it remains for inspection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlhf_pipeline.data.tokenizers import text_of
from rlhf_pipeline.disk.storage import sync
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.training.checkpoint import PREFIX, replacing, steps_in
from rlhf_pipeline.training.finite import BadRow, NotFinite
from rlhf_pipeline.training.tracking import jsonable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "failure"
SMALLER_STEPS = (
    "try a smaller learning_rate, a smaller max_grad_norm, more warmup_steps, or fp32 (bf16: false, dtype: float32)"
)


def advice(what: str, weights: Sequence[str]) -> str:
    """The advice for a figure that is not finite."""
    if weights and "reference" not in what:
        return f"{SMALLER_STEPS}; if the weights were loaded like this, check the model with `rlhf models verify`"
    if "reference" in what:
        return "check the reference model (`rlhf models verify`), or try fp32 (bf16: false, dtype: float32)"
    if what == "log-probabilities of the sampler":
        return "use rollout_engine: native, or another version of vllm"
    if what.startswith("rewards"):
        return "correct the source of the reward: it must give a finite number for every response"
    if what in ("advantages", "returns"):
        return f"{SMALLER_STEPS}, or scale the rewards down"
    return SMALLER_STEPS


def _described(row: BadRow, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    example = row.example
    chosen = range(len(example.completions)) if row.completion is None else [row.completion]

    completions = [
        {
            "number": k,
            "text": text_of(tokenizer, example.completions[k]),
            "ids": list(example.completions[k]),
            "ended": bool(example.ended[k]),
        }
        for k in chosen
    ]
    return {
        "where": example.where,
        "micro_batch": row.micro_batch,
        "prompt": text_of(tokenizer, example.prompt_ids),
        "prompt_ids": list(example.prompt_ids),
        "completions": completions,
        "values": list(row.values),
    }


def write_failure(
    directory: Path, failure: NotFinite, known: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Write the failure of a run into its directory, atomically, and replace an earlier one.

    Args:
        known: other facts of the run: last metrics, learning rate, parents.

    Returns:
        the folder.

    Raises:
        RunFailed: the disk is full, or the directory is not writable.
    """
    from safetensors.torch import save_file

    told = {
        "cause": failure.what,
        "message": str(failure),
        "update": failure.update,
        "micro_batches": sorted(failure.batches),
        "bad": len(failure.rows),
        "of": failure.total,
        "weights_not_finite": failure.weights,
        "rows": [_described(row, tokenizer) for row in failure.rows],
        **known,
    }
    tensors = {
        f"{number}.{field.name}": value.cpu().contiguous().clone()
        for number, batch in failure.batches.items()
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    with replacing(directory / FOLDER) as staged:
        (staged / "failure.json").write_text(json.dumps(jsonable(told, str), indent=1) + "\n", encoding="ascii")
        save_file(tensors, staged / "batch.safetensors")
    return directory / FOLDER


def failed_update(directory: Path) -> int | None:
    """Return the number of the failed update; None without a failure, 0 if it cannot be read."""
    try:
        return int(json.loads((directory / FOLDER / "failure.json").read_text(encoding="ascii"))["update"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return 0


def put_aside(directory: Path) -> str:
    """Rename `failure/`, whose update the run has passed, to the first free failure-<n>; return the new name."""
    number = 1
    while (target := directory / f"{FOLDER}-{number}").exists():
        number += 1
    os.rename(directory / FOLDER, target)
    sync(directory)
    return target.name


def user_error(failure: NotFinite, checkpoints: Path, kept: str) -> RunFailed:
    """The error for the user: the failure, the last checkpoint, where the batch is stored, what to try."""
    steps = steps_in(checkpoints)
    last = f"the last checkpoint is {checkpoints.name}/{PREFIX}{steps[0]}" if steps else "there is no checkpoint"
    error = RunFailed(f"{failure}; {last}; {kept}; {advice(failure.what, failure.weights)}")
    error.agreed = failure.agreed
    return error
