"""Stop a run before the optimizer uses a number that is not finite, and find the figure and its examples.

The check is one reduction per window, read together with the gradient's norm. Only if it fails, a second pass finds the
figure and the rows and, for losses and gradients, the examples that are not finite when computed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.sharding import local
from rlhf_pipeline.training.windows import Loss

SHOWN_VALUES = 8
LOSS, GRADIENT = "loss", "gradient"


@dataclass(frozen=True)
class Seen:
    """The results of a micro-batch, detached: its share of the window's loss, and the tensors in the loss."""

    micro_batch: Any
    loss: Tensor
    checked: Mapping[str, Tensor]


@dataclass(frozen=True)
class BadRow:
    """An example with a value that is not finite. completion: the number of the completion; None: the whole example.

    values: each bad value ("nan", "inf", "-inf") with its token in the completion or its parameter.
    """

    micro_batch: int
    example: Example
    completion: int | None
    values: Sequence[Mapping[str, Any]]


class NotFinite(RunFailed):
    """A figure is not finite, and the step was not applied.

    what: the figure. rows: the bad rows; total: the number of rows checked. batches: the micro-batches that hold the
    rows, by number, or all of the window if no row is bad when computed alone. weights: names of weights that are not
    finite.
    """

    def __init__(
        self,
        update: int,
        what: str,
        rows: Sequence[BadRow] = (),
        total: int = 0,
        batches: Mapping[int, PackedBatch] | None = None,
        detail: str = "",
        weights: Sequence[str] = (),
    ):
        self.update, self.what, self.rows, self.total = update, what, list(rows), total
        self.batches, self.detail, self.weights = dict(batches or {}), detail, list(weights)
        counted = ""
        if self.rows:
            unit = "examples" if self.rows[0].completion is None else "completions"
            counted = f" ({len(self.rows)} of {total} {unit}, first: {self.rows[0].example.where})"
        verb = "is" if what in (LOSS, GRADIENT) else "are"
        parts = [f"update {update}: the {what} {verb} not finite{counted}"]
        parts += [detail] if detail else []
        if self.weights:
            more = f" and {len(self.weights) - 1} more" if len(self.weights) > 1 else ""
            parts.append(f"the weights themselves are not finite: {self.weights[0]}{more}")
        super().__init__("; ".join([*parts, "this step was not applied"]))


def all_finite(values: Iterable[Tensor]) -> Tensor:
    """Whether every number in some tensors is finite: (), on their device."""
    return torch.isfinite(torch.cat([value.detach().reshape(-1) for value in values])).all()


def figures(seen: Sequence[Seen]) -> Iterator[Tensor]:
    """The tensors of a window that are checked before its gradients."""
    for one in seen:
        yield one.loss
        yield from one.checked.values()


def bad_places(value: Tensor) -> dict[int, list[dict[str, Any]]]:
    """The values that are not finite in a (C,) or (C, R) tensor, by row: as text, and for (C, R) with their token."""
    bad = ~torch.isfinite(value)
    found: dict[int, list[dict[str, Any]]] = {}
    for (row, *token), number in zip(bad.nonzero().tolist(), value[bad].tolist(), strict=True):
        found.setdefault(row, []).append(({"token": token[0]} if token else {}) | {"value": str(number)})
    return found


def bad_completions(batch: PackedBatch, value: Tensor) -> dict[int, list[dict[str, Any]]]:
    """`bad_places` for the (N,), (C,) or (C, R) values of a packed batch, by the number of the completion."""
    per_token = value.ndim == 1 and len(value) == batch.num_tokens != batch.num_completions
    return bad_places(batch.padded(value) if per_token else value)


def broken_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite; of divided ones, where the part of this process is not."""
    return [name for name, value in model.named_parameters() if not bool(torch.isfinite(local(value)).all())]


def refuse(
    update: int,
    seen: Sequence[Seen],
    *,
    model: nn.Module,
    step: Callable[[nn.Module, Any], Loss],
    counts: Mapping[str, float],
    quiet: Callable[[], AbstractContextManager],
    alone: bool = True,
    grad_norm: Tensor | None = None,
) -> NotFinite:
    """The error for a window that is not finite; it names the first bad figure in the order of the computation.

    Args:
        seen: the window's micro-batches. counts: its denominators. quiet: a context in which one example can be
            computed alone. alone: whether this process can compute without the others; else examples are not computed
            one by one.
    """
    weights = broken_weights(model)
    for what in dict.fromkeys(name for one in seen for name in one.checked):
        rows, total = [], 0
        having = [(number, one) for number, one in enumerate(seen) if what in one.checked]
        for number, one in having:
            value, batch = one.checked[what], getattr(one.micro_batch, "batch", None)
            total += len(value) if batch is None else batch.num_completions
            if batch is not None:
                rows += rows_of(number, one.micro_batch.examples, bad_completions(batch, value))
        if rows or not all(bool(torch.isfinite(one.checked[what]).all()) for _, one in having):
            return NotFinite(update, what, rows, total, _batches(seen, rows), weights=weights)
    loss = float(sum(one.loss for one in seen))
    what = GRADIENT if all(bool(torch.isfinite(one.loss)) for one in seen) else LOSS
    detail = f"loss {loss}" + ("" if grad_norm is None else f", gradient norm {float(grad_norm)}")
    rows = _one_by_one(what, seen, model, step, counts, quiet) if alone else []
    total = sum(len(getattr(one.micro_batch, "examples", ())) for one in seen)
    return NotFinite(update, what, rows, total, _batches(seen, rows), detail, weights)


def rows_of(number: int, examples: Sequence[Example], bad: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[BadRow]:
    """The bad rows of a micro-batch; its completions are numbered in the order of its examples."""
    owners = [(example, place) for example in examples for place in range(len(example.completions))]
    return [BadRow(number, *owners[row], values) for row, values in sorted(bad.items()) if row < len(owners)]


def _batches(seen: Sequence[Seen], rows: Sequence[BadRow]) -> dict[int, PackedBatch]:
    numbers = {row.micro_batch for row in rows} or range(len(seen))
    found = {number: getattr(seen[number].micro_batch, "batch", None) for number in sorted(numbers)}
    return {number: batch for number, batch in found.items() if batch is not None}


def _one_by_one(
    what: str,
    seen: Sequence[Seen],
    model: nn.Module,
    step: Callable[[nn.Module, Any], Loss],
    counts: Mapping[str, float],
    quiet: Callable[[], AbstractContextManager],
) -> list[BadRow]:
    """The examples whose loss or gradient is not finite when computed alone."""
    rows: list[BadRow] = []
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for number, one in enumerate(seen):
        examples = getattr(one.micro_batch, "examples", ())
        if what == LOSS and bool(torch.isfinite(one.loss)):
            continue
        for place, example in enumerate(examples):
            try:
                with quiet():
                    total = step(model, one.micro_batch.part(slice(place, place + 1))).total(counts)
                    values = _bad_figures(what, total, named)
            except Exception:  # report the first failure, not one of this search
                return rows
            if values:
                rows.append(BadRow(number, example, None, values))
    return rows


def _bad_figures(what: str, total: Tensor, named: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    if what == LOSS:
        return [] if bool(torch.isfinite(total)) else [{"value": str(total.item())}]
    slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    found = []
    for name, slope in zip(named, slopes, strict=True):
        if slope is not None and not bool(torch.isfinite(slope).all()):
            found.append({"parameter": name, "value": str(slope[~torch.isfinite(slope)][0].item())})
    return found[:SHOWN_VALUES]
