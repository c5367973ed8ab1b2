"""Checkpoints of a run: safetensors and JSON, written atomically; a resumed run continues bit for bit.

checkpoints/step-<n>/
    model.safetensors       trainable weights
    optimizer.safetensors   optimizer state
    rng.safetensors         random-number states of torch and its devices, NumPy and Python
    state.json              counters, schedule, optimizer settings
    manifest.json           sizes and digests of all the other files; written last

A checkpoint without a manifest, or with a file that differs from the manifest, is damaged and not used.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from rlhf_pipeline.disk.storage import staging, sync, sync_tree
from rlhf_pipeline.errors import DamagedFile, MismatchError
from rlhf_pipeline.models.sharding import as_held, load_state, whole
from rlhf_pipeline.registry.digests import file_entry

PREFIX = "step-"
STATE, MANIFEST = "state.json", "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", STATE)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match its manifest."""

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


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `target` at the end, after a sync to disk; see `staging`."""
    with staging(target.parent, target.name) as staged:
        yield staged
        sync_tree(staged)
        before = staged.with_name(f"{staged.name}.old.tmp")
        if target.exists():
            os.rename(target, before)
        os.rename(staged, target)
        sync(target.parent)
        shutil.rmtree(before, ignore_errors=True)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    kept = {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    kept.update(name for name, _ in model.named_buffers(remove_duplicate=False))  # not the scales of weights in 4 bits
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in kept}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a state dict that training changes: everything except frozen parameters.

    Divided weights are gathered: every process must call it, and only the first one gets them (see `whole`).
    """
    return whole(_trained(model))


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    extra: dict[str, Any],
    keep: int | None,
    writes: bool = True,
) -> Path:
    """Write checkpoints/step-<n> under `root` to a temporary name, sync and rename it; then keep the `keep` newest.

    Args:
        writes: whether this process writes; one that does not takes part in gathering divided weights.

    Raises:
        RunFailed: the disk is full; earlier checkpoints are unchanged.
    """
    from safetensors.torch import save_file

    target = root / f"{PREFIX}{step}"
    trained, optimizer_state = trained_state(model), optimizer.state_dict()
    tensors, values = flat_state(optimizer_state["state"])
    if not writes:
        return target
    weights, aliases = unshared(trained)
    state = {
        "step": step,
        "aliases": aliases,
        "param_groups": optimizer_state["param_groups"],
        "optimizer_values": values,
        "scheduler": {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"},
        "extra": extra,
    }
    with replacing(target) as temporary:
        for name, content in zip(FILES, (weights, tensors, random_states())):
            save_file(content, temporary / name)
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        files = {name: file_entry(temporary / name).model_dump() for name in FILES}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, separators=(",", ":")), encoding="utf-8")
    older = [found for found in steps_in(root) if found <= step]
    for old in older[keep:] if keep else []:
        os.rename(root / f"{PREFIX}{old}", root / f".{PREFIX}{old}.old.tmp")  # atomic: removed or unchanged
    clear_leftovers(root)
    return target


def clear_leftovers(root: Path) -> None:
    """Remove the temporary files of a killed process; the caller must be the only writer in `root`."""
    for path in root.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def steps_in(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, newest first."""
    found = [path.name[len(PREFIX) :] for path in root.glob(f"{PREFIX}*")] if root.is_dir() else []
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedFile(f"{path}: missing") from error
    except (ValueError, RecursionError) as error:  # another OSError is about the disk, not the checkpoint
        raise DamagedFile(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: found a {type(found).__name__}, expected an object")
    return found


def verify_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint's state and check its files.

    Raises:
        DamagedFile: a file is missing or damaged; the message names it.
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
            raise DamagedFile(f"{path}: its content differs from {MANIFEST} of this checkpoint")
    state = _read_json(directory / STATE)
    return Checkpoint(directory, state["step"], state)


def put_damaged_aside(root: Path, warn=lambda text: None) -> None:
    """Rename damaged checkpoints that are newer than the newest intact one to `damaged-step-<n>`.

    New checkpoints can then take their names. The caller must be the only writer in `root`.

    Raises:
        MismatchError: all checkpoints are from an earlier version of this package, which wrote no manifests.
    """
    steps = steps_in(root)
    if steps and not any((root / f"{PREFIX}{step}" / MANIFEST).exists() for step in steps):
        newest = root / f"{PREFIX}{steps[0]}" / STATE
        if newest.exists() and "files" in _read_json(newest):
            raise MismatchError(
                f"{root}: found checkpoints of an earlier version of this package; finish the run with that version, "
                "or start a new run with --no-resume"
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
            warn(f"{error}; kept as {aside.name}; the run continues from the previous checkpoint, if there is one")


def newest_checkpoint(root: Path, warn=lambda text: None) -> Checkpoint | None:
    """The newest intact checkpoint, or None; `warn` reports damaged ones, which are skipped."""
    for step in steps_in(root):
        try:
            return verify_checkpoint(root / f"{PREFIX}{step}")
        except DamagedFile as error:
            warn(f"{error}; using the previous checkpoint")
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
    """Restore the states that `random_states` returned."""
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


def flat_state(state: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state under dotted names, and its other values (numbers, texts, None).

    Tensors are whole: see `whole`.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            inner, rest = flat_state(value, f"{prefix}{name}.")
            tensors |= inner
            values |= rest
        elif isinstance(value, torch.Tensor):
            (found,) = whole({name: value}).values()
            tensors[f"{prefix}{name}"] = found.detach().cpu().contiguous().clone()
        elif value is None or isinstance(value, bool | int | float | str):
            values[f"{prefix}{name}"] = value
        else:
            kind = f"{prefix}{name} of the optimizer's state is a {type(value).__name__}"
            raise TypeError(f"{kind}; a checkpoint holds tensors, numbers and texts")
    return tensors, values


def nested_state(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The inverse of `flat_state`: the state of each parameter."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *values.items()]:
        index, *names, last = key.split(".")
        entry = state.setdefault(int(index), {})
        for name in names:
            entry = entry.setdefault(name, {})
        entry[last] = value
    return state


def _divided(optimizer: torch.optim.Optimizer, entries: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The state of each parameter, with this process's part of every tensor that has the shape of a divided one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def held(value: Any, parameter: torch.Tensor) -> Any:
        alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return as_held(value, parameter) if alike else value

    return {
        index: {name: held(value, parameters[index]) for name, value in saved.items()}
        for index, saved in entries.items()
    }


def _keep_types(optimizer: torch.optim.Optimizer, entries: Mapping[int, Mapping[str, Any]]) -> None:
    """Undo torch's cast of a loaded state to the type of its parameter: fp32 statistics of a bf16 weight stay fp32."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, saved in entries.items():
        state = optimizer.state[parameters[index]]
        for name, value in saved.items():
            found = state.get(name)
            if isinstance(value, torch.Tensor) and isinstance(found, torch.Tensor) and found.dtype != value.dtype:
                state[name] = value.to(found.device)


def restore(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> dict[str, Any]:
    """Restore model, optimizer, schedule and random-number states from a checkpoint; returns its `extra`.

    Raises:
        MismatchError: the checkpoint is of a model with another shape.
    """
    from safetensors.torch import load_file

    weights = load_file(checkpoint.directory / FILES[0])
    weights |= {alias: weights[name] for alias, name in checkpoint.state["aliases"].items()}
    try:
        # Frozen weights are those of the models that the run was started with; `Plan.inputs` has their digests.
        absent = sorted(_trained(model).keys() - weights.keys())
        if absent or load_state(model, weights):
            raise RuntimeError(f"it lacks {absent[0]}" if absent else "it has weights that this model lacks")
    except RuntimeError as error:
        first_lines = " ".join(str(error).split())[:200]
        raise MismatchError(f"{checkpoint.directory}: not a checkpoint of this model: {first_lines}") from error
    entries = nested_state(load_file(checkpoint.directory / FILES[1]), checkpoint.state.get("optimizer_values", {}))
    entries = _divided(optimizer, entries)
    optimizer.load_state_dict({"state": entries, "param_groups": checkpoint.state["param_groups"]})
    _keep_types(optimizer, entries)
    # The lambdas follow from the config: None keeps those of the scheduler.
    kept = {"lr_lambdas": [None] * len(scheduler.lr_lambdas)} if hasattr(scheduler, "lr_lambdas") else {}
    scheduler.load_state_dict({**checkpoint.state["scheduler"], **kept})
    set_random_states(load_file(checkpoint.directory / FILES[2]))
    return checkpoint.state["extra"]
