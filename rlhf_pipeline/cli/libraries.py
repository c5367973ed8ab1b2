"""Import the libraries that every command with a model needs."""

from __future__ import annotations

import gc
import sys


def load_libraries() -> None:
    """Import torch, accelerate and the models of transformers with the garbage collector off.

    Their three thousand modules make about a million objects that stay in memory. The collector would scan them many
    times during the import, in every later full collection, and at the end of the process. If torch is already
    imported, this does nothing and leaves the collector of the caller's process as it is.
    """
    if "torch" in sys.modules:
        return
    resting = not gc.isenabled()
    gc.disable()
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

        gc.freeze()  # the collector ignores the objects that exist now
    finally:
        if not resting:
            gc.enable()
