"""Optimizers by transformers' names: their steps, their state in a checkpoint, their exact resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from rlhf_pipeline.config.optim import OPTIMIZERS, OptimName
from rlhf_pipeline.errors import Interrupted
from rlhf_pipeline.training.checkpoint import flat_state, nested_state, newest_checkpoint, restore, save_checkpoint
from rlhf_pipeline.training.optimizer import embedding_parameters, make_optimizer, make_scheduler
from tests.conftest import sigterm_at

HAVE_BNB = importlib.util.find_spec("bitsandbytes") is not None
NAMES = [name for name in get_args(OptimName) if HAVE_BNB or OPTIMIZERS[name].package is None]
EACH = [pytest.param(name, marks=[pytest.mark.check] if OPTIMIZERS[name].package else []) for name in NAMES]
ARGUMENTS = {"sgd": {"momentum": 0.9, "nesterov": True}, "adafactor": {"beta1": 0.9}, "rmsprop": {"momentum": 0.5}}


def one(value: list[float]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def stepped(optimizer, parameter, gradients) -> list[list[float]]:
    found = []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)
        optimizer.step()
        found.append(parameter.detach().flatten().tolist())
    return found


def test_lion_by_hand() -> None:
    """lr .1, betas (.9, .5), decay .5, g = (1, -2): sign(.1 g) = (1, -1), m = (.5, -1); then g = (-1, 1):
    .9 m + .1 g = (.35, -.8): the signs stay."""
    weight = nn.Parameter(torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    lion = make_optimizer([weight], name="lion", learning_rate=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    first, second = stepped(lion, weight, [[[1.0, -2.0]], [[-1.0, 1.0]]])
    assert first == pytest.approx([0.95 - 0.1, 0.95 + 0.1], abs=1e-12)
    assert second == pytest.approx([0.95 * 0.85 - 0.1, 0.95 * 1.05 + 0.1], abs=1e-12)
    assert lion.state[weight]["exp_avg"].flatten().tolist() == pytest.approx([-0.25, 0.0], abs=1e-12)


def test_decay_is_for_matrices_alone_in_every_optimizer() -> None:
    for name in NAMES:
        matrix, vector = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64))
        made = make_optimizer([matrix, vector], name=name, learning_rate=0.1, weight_decay=0.5)
        decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
        assert decay == {id(matrix): 0.5, id(vector): 0.0}, name


def test_sgd_with_momentum_by_hand() -> None:
    weight = one([1.0])
    sgd = make_optimizer([weight], name="sgd", learning_rate=0.1, arguments={"momentum": 0.5})
    assert [value for (value,) in stepped(sgd, weight, [[1.0], [1.0]])] == pytest.approx([0.9, 0.75], abs=1e-12)


def test_adafactor_takes_the_learning_rate_as_it_is() -> None:
    """Its first update is g / |g|, as the second moment's first decay is 1 - 1^-.8 = 0; clipped at RMS 1."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    made = make_optimizer([weight], name="adafactor", learning_rate=0.25)
    assert stepped(made, weight, [[3.0, -3.0]])[0] == pytest.approx([0.75, 1.25], abs=1e-6)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 64)
        self.hidden = nn.Linear(64, 64)
        self.score = nn.Linear(64, 1, bias=False)

    def forward(self, ids):
        return self.score(torch.tanh(self.hidden(self.embed(ids)))).sum()


def test_muon_trains_hidden_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    model = Small()
    apart = embedding_parameters(model)
    assert {id(p) for p in apart} == {id(model.embed.weight), id(model.score.weight)}
    made = make_optimizer(model.parameters(), name="muon", learning_rate=0.01, vectors=apart)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.arange(8)).backward()
    made.step()
    # The orthogonalised momentum has singular values near 1: the step is .01 x .2 x sqrt(64) times such a matrix.
    step = (before["hidden.weight"] - model.hidden.weight.detach()).double() / (0.01 * 0.2 * 8)
    assert 0.6 < float(torch.linalg.matrix_norm(step, 2)) < 1.3
    # AdamW's first step is lr x sign of the gradient.
    moved = before["score.weight"] - model.score.weight.detach()
    assert torch.allclose(moved, 0.01 * model.score.weight.grad.sign(), atol=1e-5)
    assert set(made.state[model.hidden.weight]) == {"momentum_buffer"} and "exp_avg" in made.state[model.hidden.bias]


def trained(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = Small().to(dtype)
    made = make_optimizer(
        model.parameters(),
        name=name,
        learning_rate=0.01,
        weight_decay=0.1,
        arguments=ARGUMENTS.get(name),
        vectors=embedding_parameters(model) if name == "muon" else (),
    )
    return model, made, make_scheduler(made, "cosine", warmup_steps=2, total=12)


def advance(parts, first: int, last: int) -> None:
    model, optimizer, scheduler = parts
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.tensor([step % 8, 1])).backward()
        optimizer.step()
        scheduler.step()


# The optimizers of bitsandbytes keep their own state whatever the type of the weights: one type is enough.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*each.values, dtype, marks=each.marks)
        for each in EACH
        for dtype in (torch.float32, torch.bfloat16)
        if dtype is torch.float32 or not OPTIMIZERS[each.values[0]].package
    ],
)
def test_a_checkpoint_continues_bit_for_bit(tmp_path, name, dtype) -> None:
    whole = trained(name, dtype)
    advance(whole, 0, 4)
    save_checkpoint(tmp_path, 4, model=whole[0], optimizer=whole[1], scheduler=whole[2], extra={}, keep=None)
    advance(whole, 4, 9)
    resumed = trained(name, dtype)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    restore(found, model=resumed[0], optimizer=resumed[1], scheduler=resumed[2])
    advance(resumed, 4, 9)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key]), key
    assert whole[2].get_last_lr() == resumed[2].get_last_lr()


def test_a_state_of_tensors_and_numbers_comes_back_as_it_was() -> None:
    state = {0: {"step": 3, "exp": torch.ones(2), "inner": {"q": torch.zeros(1), "name": None}}, 12: {"on": True}}
    tensors, values = flat_state(state)
    assert set(tensors) == {"0.exp", "0.inner.q"} and values == {"0.step": 3, "0.inner.name": None, "12.on": True}
    back = nested_state(tensors, values)
    assert back[0]["step"] == 3 and back[0]["inner"]["name"] is None and back[12] == {"on": True}
    with pytest.raises(TypeError, match=r"0\.exp of the optimizer's state is a list"):
        flat_state({0: {"exp": [1]}})


@pytest.mark.parametrize("optim", ["adafactor", "lion", "muon", "sgd"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(lab, tmp_path, monkeypatch, optim) -> None:
    options = {"optim": optim, "max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    other = lab.copy(tmp_path / "other")
    expected = other.run("dpo", **options)
    with sigterm_at(2), pytest.raises(Interrupted):
        lab.run("dpo", **options)
    found = lab.run("dpo", **options)
    weights = other.weights(expected.model)
    assert all(torch.equal(value, weights[name]) for name, value in lab.weights(found.model).items())
    assert (Path(found.run) / "metrics.jsonl").read_text() == (Path(expected.run) / "metrics.jsonl").read_text()
    start = lab.weights("sft")
    assert any(not torch.equal(weights[name], start[name]) for name in start)


@pytest.mark.parametrize("optim", ["lion", "muon", "adafactor"])
@pytest.mark.parametrize("stage", ["sft", "train-rm", "ppo"])
def test_every_stage_trains_with_it(lab, stage, optim) -> None:
    result = lab.run(stage, optim=optim, max_steps=1, learning_rate=1e-3)
    assert lab.registry.resolve(result.model).manifest.config["optim"] == optim
