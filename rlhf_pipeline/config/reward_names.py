"""The meaning of a reward source's name: the built-in world, a Python function, a reward model, or people."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_pipeline.errors import ConfigError, Fault

WORLD_NAMES = ("world", "world:verdicts")
LLM_PREFIX = "llm-judge:"
"""Begins the name of a language model as a judge; no module has such a name."""


PEOPLE_PREFIX = "people:"
"""Begins the name of a labelling project whose labelers are the judge; a module of this name is never imported."""


def names_a_model(source: str) -> bool:
    """Whether a reward source is a reference to a model: neither the world, a function, a language model nor people."""
    other = source in WORLD_NAMES or source.startswith((LLM_PREFIX, PEOPLE_PREFIX))
    return not other and not is_function_name(source)


def is_function_name(source: str) -> bool:
    """Whether a reward source is named as module:function."""
    if source in WORLD_NAMES or source.startswith(PEOPLE_PREFIX):
        return False
    module, _, function = source.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(source: str) -> Callable[..., Sequence[float]]:
    """Import a reward function named `module:function`, also from the current directory.

    Raises:
        ConfigError: there is no such module or function, or the import fails.
    """
    module_name, _, name = source.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's module may raise any error on import
        raise ConfigError(
            Fault(
                source, f"cannot import it ({type(error).__name__}: {error})", "module:function, importable from here"
            )
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(function):
        raise ConfigError(Fault(source, f"found a {type(function).__name__}", "a function"))
    return function
