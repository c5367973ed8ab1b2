"""Checkpoints of a run: safetensors and JSON, whole or not at all, enough to go on bit for bit.

checkpoints/step-<n>/
    model.safetensors       trainable weights
    optimizer.safetensors   optimizer state
    rng.safetensors         random-number state of torch (used only where dropout is on)
    state.json              counters, schedule, optimizer settings; sizes and digests of the other files; last
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_pipeline.errors import DamagedFile, MismatchError

PREFIX = "step-"
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and whose files are what they were when written."""

    directory: Path
    step: int
    state: dict[str, Any]


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        digest = sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unshared(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Split a state dict into tensors that each own their memory, and names that alias one of them (tied weights)."""
    owners: dict[tuple, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and key in owners:
            aliases[name] = owners[key]
        else:
            owners[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, entry in state["state"].items()
        for name, value in entry.items()
    }
    return tensors, state["param_groups"]


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    extra: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write checkpoints/step-<n> under `root` beside its target, sync it, rename it; then prune to `keep`."""
    from safetensors.torch import save_file

    target = root / f"{PREFIX}{step}"
    temporary = root / f".{PREFIX}{step}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights, aliases = unshared(model.state_dict())
    save_file(weights, temporary / FILES[0])
    tensors, groups = _optimizer_tensors(optimizer)
    save_file(tensors, temporary / FILES[1])
    rng = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng |= {f"cuda.{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    save_file(rng, temporary / FILES[2])
    state = {
        "step": step,
        "aliases": aliases,
        "param_groups": groups,
        "scheduler": {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"},
        "extra": extra,
        "files": {
            name: {"size": (temporary / name).stat().st_size, "sha256": _digest(temporary / name)} for name in FILES
        },
    }
    (temporary / "state.json").write_text(json.dumps(state))
    for name in (*FILES, "state.json"):
        _sync(temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    _sync(root)
    for old in _steps(root)[keep:] if keep else []:
        shutil.rmtree(root / f"{PREFIX}{old}")
    return target


def _steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, newest first."""
    found = [path.name[len(PREFIX) :] for path in root.glob(f"{PREFIX}*")] if root.is_dir() else []
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)


def verify_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint's state and check its files.

    Raises:
        DamagedFile: naming the file that is missing, or not what was written.
    """
    try:
        state = json.loads((directory / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{directory / 'state.json'}: cannot be read ({error})") from error
    for name, expected in state["files"].items():
        path = directory / name
        if not path.is_file():
            raise DamagedFile(f"{path}: missing")
        if path.stat().st_size != expected["size"] or _digest(path) != expected["sha256"]:
            raise DamagedFile(
                f"{path}: its content is not what was written (sha256 {expected['sha256'][:12]} expected)"
            )
    return Checkpoint(directory, state["step"], state)


def newest_checkpoint(root: Path, warn=lambda text: None) -> Checkpoint | None:
    """The newest checkpoint that is intact; damaged ones are named through `warn` and passed over."""
    for step in _steps(root):
        try:
            return verify_checkpoint(root / f"{PREFIX}{step}")
        except DamagedFile as error:
            warn(f"{error}; the checkpoint before it is used")
    return None


def restore(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> dict[str, Any]:
    """Put a checkpoint back into model, optimizer, schedule and random-number state; returns its `extra`.

    Raises:
        MismatchError: when it was written by a model of another shape.
    """
    from safetensors.torch import load_file

    weights = load_file(checkpoint.directory / FILES[0])
    weights |= {alias: weights[name] for alias, name in checkpoint.state["aliases"].items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first_lines = " ".join(str(error).split())[:200]
        raise MismatchError(f"{checkpoint.directory}: not a checkpoint of this model: {first_lines}") from error
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(checkpoint.directory / FILES[1]).items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": checkpoint.state["param_groups"]})
    # The lambdas follow from the config: None keeps those that the scheduler has.
    kept = [None] * len(scheduler.lr_lambdas)
    scheduler.load_state_dict({**checkpoint.state["scheduler"], "lr_lambdas": kept})
    rng = load_file(checkpoint.directory / FILES[2])
    torch.set_rng_state(rng.pop("torch"))
    if rng and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([rng[key] for key in sorted(rng)])
    return checkpoint.state["extra"]
