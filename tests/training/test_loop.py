"""The loop, on a linear model whose gradients are known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.training.loop import fit
from rlhf_pipeline.training.windows import Loss, Window

X = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])


class Slope(nn.Module):
    """y = w x."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, x):
        return self.weight * x


def step(model: Slope, x: torch.Tensor) -> Loss:
    """Loss sum: sum of w x, denominator "examples"; its gradient is the mean of x."""
    return Loss({"line": (model(x).sum(), "examples", 1.0)}, {"x": (x.sum(), "examples")})


class Schedule:
    """Counts its steps; the rate is 1 / (1 + steps)."""

    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1

    def get_last_lr(self):
        return [1 / (1 + self.steps)]


def train(windows, step=step, model=None, max_grad_norm=0.0, start=0):
    model = model or Slope()
    updates, schedule = [], Schedule()
    steps = fit(
        model,
        windows,
        step,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        scheduler=schedule,
        accelerator=Accelerator(cpu=True),
        max_grad_norm=max_grad_norm,
        on_update=lambda number, metrics, window: updates.append((number, metrics)),
        start=start,
    )
    return model, updates, schedule, steps


def window(x: torch.Tensor, parts: int = 1, **fields) -> Window:
    return Window(list(x.chunk(parts)), {"examples": float(len(x))}, **fields)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_gradient_is_the_mean_over_the_window_however_it_is_cut(parts):
    model, updates, _, steps = train([window(X, parts)])
    assert model.weight.item() == pytest.approx(1 - 4.5, abs=1e-6)
    assert steps == 1
    number, metrics = updates[0]
    assert number == 1
    assert metrics["loss/line"] == pytest.approx(4.5)
    assert metrics["x"] == pytest.approx(4.5)
    assert metrics["grad_norm"] == pytest.approx(4.5)


def test_uneven_micro_batches_weigh_examples_not_micro_batches():
    uneven = Window([X[:1], X[1:]], {"examples": 8.0})
    assert train([uneven])[0].weight.item() == pytest.approx(1 - 4.5, abs=1e-6)


def test_terms_have_their_own_denominators_and_weights():
    def two(model, x):
        return Loss({"a": (model(x).sum(), "examples", 1.0), "sub/b": (model(x).sum(), "tokens", 0.5)})

    both = Window([X], {"examples": 8.0, "tokens": 16.0})
    model, updates, *_ = train([both], two)
    assert model.weight.item() == pytest.approx(1 - (36 / 8 + 0.5 * 36 / 16), abs=1e-6)
    assert {"loss/a", "sub/b"} <= set(updates[0][1])  # a name with a slash is kept as it is


def test_clipping_limits_the_norm_and_0_clips_nothing():
    assert train([window(X)], max_grad_norm=2.0)[0].weight.item() == pytest.approx(1 - 2.0, abs=1e-5)
    assert train([window(X)], max_grad_norm=100.0)[0].weight.item() == pytest.approx(1 - 4.5, abs=1e-6)
    assert train([window(X)], max_grad_norm=0.0)[0].weight.item() == pytest.approx(1 - 4.5, abs=1e-6)


def test_clipping_reports_the_norm_before_it():
    assert train([window(X)], max_grad_norm=2.0)[1][0][1]["grad_norm"] == pytest.approx(4.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 7])
def test_a_loss_that_is_not_finite_stops_the_run_and_changes_no_weight(bad, place):
    x = X.clone()
    x[place] = bad
    model = Slope()
    with pytest.raises(RunFailed, match="update 2: the loss is not finite"):
        train([window(X), window(x, 8)], model=model)
    assert model.weight.item() == pytest.approx(1 - 4.5, abs=1e-6)


@pytest.mark.parametrize("place", [0, 7])
def test_a_loss_that_is_not_finite_is_found_where_the_gradient_is(place):
    def detached(model, x):
        return Loss({"line": (model(torch.ones(1)).sum() + x.sum(), "examples", 1.0)})

    x = X.clone()
    x[place] = math.inf
    model = Slope()
    with pytest.raises(RunFailed, match="the loss is not finite"):
        train([window(x, 8)], detached, model=model)
    assert model.weight.item() == 1.0


def test_a_gradient_that_is_not_finite_stops_the_run():
    def root(model, x):
        return Loss({"root": ((model.weight - model.weight.detach()).abs().sqrt().sum(), "examples", 1.0)})

    model = Slope()
    with pytest.raises(RunFailed, match="the gradient is not finite"):
        train([window(X)], root, model=model)
    assert model.weight.item() == 1.0


def test_the_schedule_steps_and_metrics_are_logged_only_where_an_update_ends():
    parts = [window(X[:4], ends_update=False), window(X[4:], metrics={"rollout": 7.0}, epoch=0.5)]
    _, updates, schedule, steps = train(parts + parts, start=3)
    assert (steps, schedule.steps) == (4, 2)
    assert [number for number, _ in updates] == [4, 5]
    first = updates[0][1]
    assert first["x"] == pytest.approx(4.5)  # over both windows of the update
    assert (first["rollout"], first["epoch"]) == (7.0, 0.5)
    assert [metrics["learning_rate"] for _, metrics in updates] == [1.0, 0.5]
