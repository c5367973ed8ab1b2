"""The loop: the only backward() in the package, shared by all stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.sharding import gathered
from rlhf_pipeline.training.finite import Seen, all_finite, figures, refuse
from rlhf_pipeline.training.ranks import Ranks, together
from rlhf_pipeline.training.windows import Loss, Window, cut_micro_batches, size_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Step = Callable[[nn.Module, Any], Loss]
OnUpdate = Callable[[int, dict[str, float], Window], None]


class Sums:
    """Metric sums of an update, kept on the device and read with one synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[torch.Tensor, str]] = {}  # each with the name of its denominator
        self._counts: dict[str, float] = {}

    def add(self, name: str, value: torch.Tensor, denominator: str) -> None:
        value = value.detach().double()
        self._sums[name] = (self._sums[name][0] + value if name in self._sums else value, denominator)

    def add_loss(self, loss: Loss) -> None:
        for name, (value, denominator, _) in loss.terms.items():
            self.add(f"loss/{name}" if "/" not in name else name, value, denominator)
        for name, (value, denominator) in loss.metrics.items():
            self.add(name, value, denominator)

    def merge(self, other: Sums) -> None:
        for name, (value, denominator) in other._sums.items():
            self.add(name, value, denominator)

    def count(self, counts: dict[str, float]) -> None:
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        if not self._sums:
            return {}
        totals = reduce(torch.stack([value for value, _ in self._sums.values()])).tolist()
        counts = [max(self._counts[denominator], 1e-12) for _, denominator in self._sums.values()]
        return {name: total / count for name, total, count in zip(self._sums, totals, counts, strict=True)}


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
    memory: Memory | None = None,
) -> int:
    """Train on all windows; returns the number of optimizer steps taken.

    For each window, the loss SUMS of its micro-batches are divided by the window's global counts and added up over
    micro-batches and ranks; then the gradients are checked, clipped and applied. So 1 x 8 and 8 x 1 micro-batches, and
    one rank and several, take the same step. If memory runs out, the window is computed again in halves.

    Args:
        step: maps (model, micro-batch) to a `Loss`.
        max_grad_norm: clip to this global norm; 0 disables clipping.
        on_update: called with (updates done, metrics, window) when a window ends an update.
        start: updates done before a resume. memory: keeps the halvings of the run.

    Raises:
        NotFinite: a loss, a tensor in it, or a gradient is not finite; the optimizer has not stepped.
        RunFailed: halved micro-batches do not fit into memory either.
    """
    memory, ranks = memory or Memory(), Ranks(accelerator, model)
    memory.repeats = ranks.alone
    sums, updates, steps = Sums(), start, 0
    refused = partial(refuse, model=model, step=step, quiet=ranks.accumulating, alone=ranks.alone)

    def accumulate(window: Window, halvings: int) -> tuple[Sums, list[Seen]]:
        """Add up the gradients of a window with its micro-batches halved `halvings` times."""
        batches = ranks.even(list(cut_micro_batches(window.micro_batches, halvings - window.halvings)))
        found, seen = Sums(), []
        for number, micro_batch in enumerate(batches, 1):
            memory.holds(size_of(micro_batch))
            with ranks.accumulating(last=number == len(batches)):
                loss = step(model, micro_batch)
                total = loss.total(window.counts)
                found.add_loss(loss)
                accelerator.backward(total)
            checked = {name: value.detach() for name, value in loss.checked.items()}
            seen.append(Seen(micro_batch, total.detach(), checked))
        return found, seen

    def computed(window: Window) -> tuple[Sums, list[Seen]]:
        """`accumulate`, halved until it fits into memory; several ranks add up gradients only if all are finite."""
        attempt = partial(accumulate, window)
        found, seen = memory.repeat("training", attempt, partial(optimizer.zero_grad, set_to_none=True))
        if ranks.count > 1 and not bool(all_finite(figures(seen))):
            raise refused(updates + 1, seen, counts=window.counts)
        return found, seen

    for window in windows:
        optimizer.zero_grad(set_to_none=True)
        sums.count(window.counts)
        found, seen = together(accelerator, memory, partial(computed, window))
        ranks.add_gradients(model.parameters())
        grad_norm = gathered(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf))
        if not bool(all_finite([grad_norm, *figures(seen)])):
            optimizer.zero_grad(set_to_none=True)
            failure = refused(updates + 1, seen, counts=window.counts, grad_norm=grad_norm)
            raise ranks.agreed(failure)
        sums.merge(found)
        optimizer.step()
        steps += 1
        if not window.ends_update:
            continue
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        updates += 1
        metrics = sums.read(ranks.reduce) | window.metrics
        metrics |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate, "epoch": window.epoch}
        on_update(updates, metrics, window)
        sums = Sums()
    return steps
