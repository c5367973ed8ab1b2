"""The code and environment that made a version."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import rlhf_pipeline

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "trl",
    "peft",
    "numpy",
)


def code_state() -> dict[str, Any]:
    """Return the package's version and, in a git checkout, its commit and whether files were modified.

    A process asks git once: it goes on with the code that it has loaded, whatever is changed or committed meanwhile.
    """
    commit, modified = _checkout(Path(rlhf_pipeline.__file__).resolve().parent)
    return {"package": rlhf_pipeline.__version__, "commit": commit, "modified": modified}


@functools.cache
def _checkout(package: Path) -> tuple[str | None, bool | None]:
    """The commit that a package's folder is at, and whether its files were modified; None: not known."""
    found = _git(package, "rev-parse", "--show-toplevel", "HEAD")
    top, _, commit = (found or "").rpartition("\n")
    # An installed copy may be inside another project's checkout, whose commit would be wrong.
    if not top or Path(top).resolve() != package.parent:
        return None, None
    changes = _git(package, "status", "--porcelain", "--", str(package))
    return commit, None if changes is None else bool(changes)


def source_digest() -> str:
    """Return the SHA-256 of the package's source files."""
    package = Path(rlhf_pipeline.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Return the versions, platform and thread count that a run used, without importing torch."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": None,
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
    return found | {package: _installed(package) for package in PACKAGES}


@functools.cache  # reading it takes longer than a training step of a tiny model
def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
