"""The process of a stage: its device and precision, its threads, its random generators."""

from __future__ import annotations

import logging
import os
import random
import warnings
from typing import TYPE_CHECKING

import torch

from rlhf_pipeline.config.stages import ModelConfig
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.training.launcher import launched
from rlhf_pipeline.training.precision import bound_product_cache, uses_bf16

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: ModelConfig) -> Accelerator:
    """An Accelerator with the device and precision of a config; also sets the number of threads if configured.

    Raises:
        BadInput: the launcher asks for what no stage has; or there are more processes than GPUs.
    """
    launched()  # takes its variables away
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # this package shows its own
    transformers_logging.set_verbosity_error()

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    _require_devices(config)
    bound_product_cache()
    # Its successor still copies the buffers once; "broadcast_buffers" is what this package means.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    precision = "bf16" if uses_bf16(config) else "no"
    # Accelerate keeps the precision per process: an earlier run in this process may have had another one.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state(reset_partial_state=False)
    # During critic warm-up the actor has no gradient, which DDP otherwise reports as an error. Buffers do not change,
    # and a process that repeats a forward pass must not wait for the buffers of the others.
    frozen_actor = bool(getattr(config, "critic_warmup_steps", 0))
    kept = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=frozen_actor)
    return Accelerator(
        cpu=config.use_cpu,
        mixed_precision=precision,
        kwargs_handlers=[kept],
        # Else the launcher's config decides: accelerate divides losses by its number of steps, and compiles the model.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )


def _require_devices(config: ModelConfig) -> None:
    """Check that each process on this machine has a GPU of its own, unless all train on the CPU.

    Raises:
        BadInput: there are fewer GPUs.
    """
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not config.use_cpu and 0 < devices < processes:
        raise BadInput(
            f"found {processes} processes on {devices} GPU{'s' if devices > 1 else ''}, expected at most one per GPU; "
            f"use --num-processes {devices}, or use_cpu: true"
        )


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
