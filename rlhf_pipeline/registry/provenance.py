"""The code and environment that made a version."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
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

    It is the state at the first call: a process goes on with the code that it has loaded, whatever is changed or
    committed meanwhile. An answer that git did not give is None, and git is asked again at the next call.
    """
    package = Path(rlhf_pipeline.__file__).resolve().parent
    found: dict[str, Any] = {"commit": None, "modified": None}
    with suppress(OSError, subprocess.SubprocessError):
        if _is_checkout(package):
            for name, ask in (("modified", _is_modified), ("commit", _commit)):
                with suppress(OSError, subprocess.SubprocessError):
                    found[name] = ask(package)
    return {"package": rlhf_pipeline.__version__, **found}


@functools.cache  # not of an error
def _is_checkout(package: Path) -> bool:
    """Return whether the folder above a package is a git checkout. An installed copy may be inside another project's,
    whose commit would be wrong."""
    if not (package.parent / ".git").exists():
        return False
    return Path(_git(package, "rev-parse", "--show-toplevel")).resolve() == package.parent


@functools.cache
def _is_modified(package: Path) -> bool:
    return bool(_git(package, "status", "--porcelain", "--", str(package)))


@functools.cache
def _commit(package: Path) -> str:
    return _git(package, "rev-parse", "HEAD^{commit}")


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


def _git(folder: Path, *arguments: str) -> str:
    """Return what git prints.

    Raises:
        OSError: it cannot be started. SubprocessError: it failed, or took too long.
    """
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
