"""The libraries of every command that reads a model, imported in one go."""

from __future__ import annotations

import gc
import sys


def load_libraries() -> None:
    """Import torch, accelerate and the models of transformers while the garbage collector rests.

    Their three thousand modules make about a million objects, all of which stay. The collector would walk through them
    over and over while they are imported, at every full collection afterwards, and once more when the process ends.
    Where torch is imported already nothing happens: the collector of a caller's process is the caller's affair.
    """
    if "torch" in sys.modules:
        return
    resting = not gc.isenabled()
    gc.disable()
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

        gc.freeze()  # the objects so far are never looked at again
    finally:
        if not resting:
            gc.enable()
