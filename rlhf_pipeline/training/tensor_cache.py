"""Tensors in `cache/`: written atomically, and verified when read."""

from __future__ import annotations

import os
import uuid
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from rlhf_pipeline.disk.storage import mark_used

NAME, DIGEST = "values", "sha256"


def _digest(tensor: Tensor) -> str:
    head = f"{tensor.dtype} {tuple(tensor.shape)} "
    return sha256(head.encode() + tensor.numpy().tobytes()).hexdigest()


def read_tensor(path: Path) -> Tensor | None:
    """The tensor in a file; None if the file is missing or damaged, so that the caller computes it again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor, metadata = file.get_tensor(NAME), file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if metadata.get(DIGEST) != _digest(tensor):
        return None
    mark_used(path)
    return tensor


def write_tensor(path: Path, tensor: Tensor) -> None:
    """Write a CPU tensor with its digest, first to a temporary name."""
    from safetensors.torch import save_file

    tensor = tensor.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        save_file({NAME: tensor}, temporary, metadata={DIGEST: _digest(tensor)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
