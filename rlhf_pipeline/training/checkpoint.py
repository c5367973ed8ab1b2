"""Checkpoints of a run: safetensors and JSON, whole or not at all, enough to go on bit for bit.

checkpoints/step-<n>/
    model.safetensors       trainable weights
    optimizer.safetensors   optimizer state
    rng.safetensors         random-number states of torch and its devices, NumPy and Python
    state.json              counters, schedule, optimizer settings
    manifest.json           sizes and digests of all the other files; written last

A checkpoint without a manifest, or with a file that is not what the manifest says, is no checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from rlhf_pipeline.errors import DamagedFile, MismatchError
from rlhf_pipeline.registry.digests import file_entry
from rlhf_pipeline.registry.storage import staging, sync, sync_tree

PREFIX = "step-"
STATE, MANIFEST = "state.json", "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", STATE)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and whose files are what they were when written."""

    directory: Path
    step: int
    state: dict[str, Any]


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
    """Write checkpoints/step-<n> under `root` beside its target, sync it, rename it; then prune to the `keep` newest.

    Raises:
        RunFailed: the disk is full; the checkpoints before are as they were.
    """
    from safetensors.torch import save_file

    target = root / f"{PREFIX}{step}"
    weights, aliases = unshared(model.state_dict())
    tensors, groups = _optimizer_tensors(optimizer)
    state = {
        "step": step,
        "aliases": aliases,
        "param_groups": groups,
        "scheduler": {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"},
        "extra": extra,
    }
    with staging(root, target.name) as temporary:
        for name, content in zip(FILES, (weights, tensors, random_states())):
            save_file(content, temporary / name)
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        files = {name: file_entry(temporary / name).model_dump() for name in FILES}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, separators=(",", ":")), encoding="utf-8")
        sync_tree(temporary)
        if target.exists():
            os.rename(target, temporary.with_name(f"{temporary.name}.old.tmp"))
        os.rename(temporary, target)
        sync(root)
    older = [found for found in _steps(root) if found <= step]
    for old in older[keep:] if keep else []:
        os.rename(root / f"{PREFIX}{old}", root / f".{PREFIX}{old}.old.tmp")  # gone at once, or there as it was
    clear_leftovers(root)
    return target


def clear_leftovers(root: Path) -> None:
    """Remove what a process that died while it wrote has left; the caller is the only one that writes here."""
    for path in root.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, newest first."""
    found = [path.name[len(PREFIX) :] for path in root.glob(f"{PREFIX}*")] if root.is_dir() else []
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedFile(f"{path}: missing") from error
    except (ValueError, RecursionError) as error:  # another OSError speaks of the disk, not of the checkpoint
        raise DamagedFile(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: a {type(found).__name__}, not an object")
    return found


def verify_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint's state and check its files.

    Raises:
        DamagedFile: naming the file that is missing, or not what was written.
    """
    manifest = directory / MANIFEST
    files = _read_json(manifest).get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise DamagedFile(f"{manifest}: does not list {', '.join(FILES)}")
    for name in FILES:
        path, expected = directory / name, files[name]
        if not path.is_file():
            raise DamagedFile(f"{path}: missing")
        if file_entry(path).model_dump() != expected:
            raise DamagedFile(f"{path}: its content is not what {MANIFEST} says was written")
    state = _read_json(directory / STATE)
    return Checkpoint(directory, state["step"], state)


def put_damaged_aside(root: Path, warn=lambda text: None) -> None:
    """Rename checkpoints that are newer than the newest intact one, so that none stands in the way of new ones.

    They are kept as `damaged-step-<n>`. The caller is the only one that writes here.

    Raises:
        MismatchError: there are none but those of an earlier version of this package, which had no manifests.
    """
    steps = _steps(root)
    if steps and not any((root / f"{PREFIX}{step}" / MANIFEST).exists() for step in steps):
        newest = root / f"{PREFIX}{steps[0]}" / STATE
        if newest.exists() and "files" in _read_json(newest):
            raise MismatchError(
                f"{root}: checkpoints of an earlier version of this package; finish the run with that version, or "
                "start afresh with --no-resume"
            )
    for step in steps:
        directory = root / f"{PREFIX}{step}"
        try:
            verify_checkpoint(directory)
            return
        except DamagedFile as error:
            aside = root / f"damaged-{directory.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(directory, aside)
            warn(f"{error}; kept as {aside.name}, the run goes on from the checkpoint before it, if there is one")


def newest_checkpoint(root: Path, warn=lambda text: None) -> Checkpoint | None:
    """The newest checkpoint that is intact; damaged ones are named through `warn` and passed over."""
    for step in _steps(root):
        try:
            return verify_checkpoint(root / f"{PREFIX}{step}")
        except DamagedFile as error:
            warn(f"{error}; the checkpoint before it is used")
    return None


def random_states() -> dict[str, torch.Tensor]:
    """The states of all random-number generators, as tensors."""
    version, words, gauss = random.getstate()
    legacy = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())
    _, numpy_words, position, has_gauss, cached = legacy
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numpy_words.tolist(), position, has_gauss]),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Put the states of `random_states` back."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    gauss = states["python.gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *words, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy.gauss"].item()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, cached))
    devices = [states[key] for key in sorted(states, key=lambda key: (len(key), key)) if key.startswith("cuda.")]
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])


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
    set_random_states(load_file(checkpoint.directory / FILES[2]))
    return checkpoint.state["extra"]
