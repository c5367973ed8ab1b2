"""The loop: the only backward() in the package, shared by all stages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.training.windows import Loss, Window

if TYPE_CHECKING:
    from accelerate import Accelerator

Step = Callable[[nn.Module, Any], Loss]
OnUpdate = Callable[[int, dict[str, float], Window], None]


class Sums:
    """Metric sums of an update, kept on the device and read out with one synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._names: dict[str, str] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, value: torch.Tensor, denominator: str) -> None:
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._names[name] = denominator

    def count(self, counts: dict[str, float]) -> None:
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        if not self._sums:
            return {}
        values = reduce(torch.stack(list(self._sums.values()))).tolist()
        named = zip(self._sums, values, strict=True)
        return {name: value / max(self._counts[self._names[name]], 1e-12) for name, value in named}


def fit(
    model: nn.Module,
    windows: Iterable[Window],
    step: Step,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    accelerator: Accelerator,
    max_grad_norm: float,
    on_update: OnUpdate,
    start: int = 0,
) -> int:
    """Train on windows until they end; returns the number of optimizer steps taken.

    For each window: every micro-batch's loss SUMS are divided by the window's global counts and, because DDP
    averages gradients over ranks, multiplied by the number of ranks; then gradients are checked, clipped and
    applied. So micro-batches of 1 x 8 and 8 x 1, and one rank and several, take the same step.

    Args:
        step: maps (model, micro-batch) to a `Loss`.
        max_grad_norm: clip to this global norm; 0 clips nothing.
        on_update: called with (updates done, metrics, window) when a window ends an update.
        start: updates done before (after a resume).

    Raises:
        RunFailed: when a loss or gradient is not finite, before the optimizer steps.
    """
    ranks = accelerator.num_processes
    sums, updates, steps = Sums(), start, 0

    def reduce(values: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(values, "sum") if ranks > 1 else values

    grad_norm = torch.zeros(())
    for window in windows:
        optimizer.zero_grad(set_to_none=True)
        sums.count(window.counts)
        last = len(window.micro_batches) - 1
        window_loss = torch.zeros((), device=accelerator.device)
        for number, micro_batch in enumerate(window.micro_batches):
            sync = contextlib.nullcontext() if number == last else accelerator.no_sync(model)
            with sync:
                loss = step(model, micro_batch)
                total = torch.zeros((), device=accelerator.device)
                for name, (value, denominator, weight) in loss.terms.items():
                    total = total + weight * value / window.counts[denominator]
                    sums.add(f"loss/{name}" if "/" not in name else name, value, denominator)
                for name, (value, denominator) in loss.metrics.items():
                    sums.add(name, value, denominator)
                accelerator.backward(total * ranks)
                window_loss += total.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
        _require_finite(grad_norm, window_loss, updates)
        optimizer.step()
        steps += 1
        if not window.ends_update:
            continue
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        updates += 1
        metrics = sums.read(reduce) | window.metrics
        metrics |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate, "epoch": window.epoch}
        on_update(updates, metrics, window)
        sums = Sums()
    return steps


def _require_finite(grad_norm: torch.Tensor | None, loss: torch.Tensor, update: int) -> None:
    if grad_norm is None or bool(torch.isfinite(grad_norm) & torch.isfinite(loss)):
        return
    what = "loss" if not bool(torch.isfinite(loss)) else "gradient"
    raise RunFailed(
        f"update {update + 1}: the {what} is not finite (loss {float(loss)}, gradient norm {float(grad_norm)}); "
        "nothing of this step was applied. Try a smaller learning_rate, a smaller max_grad_norm, or fp32"
    )
