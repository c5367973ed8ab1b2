"""Errors for files that cannot be loaded as a model."""

from __future__ import annotations

import errno
from typing import Any

import torch

from rlhf_pipeline.disk.storage import error_number, failure_of
from rlhf_pipeline.errors import RlhfError

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")


def ran_out(error: BaseException) -> bool:
    """Whether an error means that the memory of the accelerator or of the machine ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _NO_MEMORY):
        return True
    return not isinstance(error, RlhfError) and error_number(error) == errno.ENOMEM


def require_full_precision(config: Any) -> None:
    """Refuse a config with quantised weights, and remove its choice of code for experts; both would be downloaded.

    Raises:
        ValueError: the config has `quantization_config`.
    """
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            raise ValueError("quantization_config: quantised weights cannot be loaded yet; expected a plain model")
    config._experts_implementation = None


def require_sizes(config: Any) -> None:
    """Refuse a config with a size below 1, with which some architectures fail only when they are used.

    Raises:
        ValueError: a size is below 1; the message names it.
    """
    text = config.get_text_config()
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{key} {value}, expected at least 1")


def refuse_to_hide(error: Exception) -> None:
    """Raise errors that do not concern the content of the model's files: no memory, disk full, no permission."""
    if ran_out(error) or "allocate memory" in str(error) or failure_of(error, "") is not None:
        raise error
