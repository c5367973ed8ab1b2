"""Checkpoints: whole or absent, checked when read, put back bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from rlhf_pipeline.errors import DamagedFile, MismatchError
from rlhf_pipeline.training.checkpoint import (
    newest_checkpoint,
    put_damaged_aside,
    restore,
    save_checkpoint,
    unshared,
    verify_checkpoint,
)
from rlhf_pipeline.training.optimizer import make_optimizer, make_scheduler, resolve_warmup


class Tied(nn.Module):
    """Two names for one matrix, and a vector."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x)).log_softmax(-1)[:, 0].sum()


def training(seed: int = 0, width: int = 3):
    torch.manual_seed(seed)
    model = Tied(width)
    optimizer = make_optimizer(model.parameters(), learning_rate=0.1, weight_decay=0.01)
    return model, optimizer, make_scheduler(optimizer, "linear", warmup_steps=0.2, total=20)


def advance(parts, steps: int):
    model, optimizer, scheduler = parts
    for step in range(steps):
        optimizer.zero_grad()
        (model(torch.tensor([step % 5, 1])) * torch.rand(())).backward()  # random numbers are part of the state
        optimizer.step()
        scheduler.step()


def save(root, step, parts, keep=None):
    model, optimizer, scheduler = parts
    return save_checkpoint(
        root, step, model=model, optimizer=optimizer, scheduler=scheduler, extra={"n": step}, keep=keep
    )


def put_back(checkpoint, parts):
    model, optimizer, scheduler = parts
    return restore(checkpoint, model=model, optimizer=optimizer, scheduler=scheduler)


def test_going_on_from_a_checkpoint_is_bit_equal(tmp_path):
    parts = training()
    advance(parts, 4)
    save(tmp_path, 4, parts)
    advance(parts, 5)
    other = training(seed=9)
    assert put_back(newest_checkpoint(tmp_path), other) == {"n": 4}
    advance(other, 5)
    for name, value in parts[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name])
    assert parts[2].get_last_lr() == other[2].get_last_lr()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = training()[0]
    tensors, aliases = unshared(model.state_dict())
    assert aliases == {"head.weight": "embed.weight"}
    assert set(tensors) == {"embed.weight", "head.bias"}
    parts = training()
    advance(parts, 2)
    save(tmp_path, 2, parts)
    other = training(seed=5)
    put_back(newest_checkpoint(tmp_path), other)
    assert other[0].head.weight is other[0].embed.weight
    assert torch.equal(other[0].head.weight, parts[0].embed.weight)


def test_the_newest_ones_are_kept(tmp_path):
    parts = training()
    for step in (2, 9, 10, 11):
        save(tmp_path, step, parts, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    save(tmp_path, 12, parts)  # no limit
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_newer_one_is_put_aside_and_never_costs_an_intact_one_its_place(tmp_path):
    parts = training()
    save(tmp_path, 4, parts)
    (save(tmp_path, 9, parts) / "model.safetensors").write_bytes(b"")
    said = []
    put_damaged_aside(tmp_path, warn=said.append)
    assert len(said) == 1 and "step-9/model.safetensors" in said[0] and "damaged-step-9" in said[0]
    assert newest_checkpoint(tmp_path).step == 4
    save(tmp_path, 5, parts, keep=1)  # the run went on from 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-9", "step-5"]
    put_damaged_aside(tmp_path, warn=said.append)
    assert len(said) == 1


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, 1, training())

    def fail(self, *_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_text", fail)
    with pytest.raises(OSError, match="Input/output"):
        put_damaged_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_checkpoints_of_an_earlier_version_are_refused_and_stay(tmp_path):
    (save(tmp_path, 3, training()) / "manifest.json").unlink()
    state = tmp_path / "step-3/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "files": {}}))
    with pytest.raises(MismatchError, match=r"earlier version.*--no-resume"):
        put_damaged_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    parts = training()
    (save(tmp_path, 3, parts) / "manifest.json").unlink()
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 3, parts)
    assert newest_checkpoint(tmp_path).step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_leftovers_of_a_dead_process_go_with_the_next_checkpoint(tmp_path):
    (tmp_path / ".step-1-0123.tmp").mkdir()
    save(tmp_path, 2, training())
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_every_generator_of_random_numbers_goes_on(tmp_path):
    import random

    import numpy as np

    parts = training()
    random.gauss(0, 1)  # leaves a second number behind, which is part of the state
    np.random.standard_normal()
    save(tmp_path, 1, parts)

    def drawn():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(()).item()

    expected = drawn()
    drawn()
    put_back(newest_checkpoint(tmp_path), parts)
    assert drawn() == expected


FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]


@pytest.mark.check
def test_every_flipped_bit_of_the_small_files_is_found(tmp_path):
    directory = save(tmp_path, 1, training())
    for name in ("state.json", "manifest.json", "rng.safetensors"):
        content = (directory / name).read_bytes()
        for bit in range(0, 8 * len(content), max(1, 8 * len(content) // 400)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (directory / name).write_bytes(bytes(changed))
            with pytest.raises(DamagedFile, match=f"{name}|manifest.json"):
                verify_checkpoint(directory)
        (directory / name).write_bytes(content)
    verify_checkpoint(directory)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, name, damage):
    parts = training()
    advance(parts, 1)
    save(tmp_path, 1, parts)
    file = save(tmp_path, 2, parts) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        changed = bytearray(content)
        changed[-1] ^= 0xFF
        file.write_bytes(bytes(changed))
    with pytest.raises(DamagedFile, match=name):
        verify_checkpoint(tmp_path / "step-2")
    warnings = []
    assert newest_checkpoint(tmp_path, warn=warnings.append).step == 1
    assert len(warnings) == 1 and name in warnings[0]


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path):
    save(tmp_path, 1, training())
    (tmp_path / ".step-2.77.tmp").mkdir()
    (tmp_path / "step-x").mkdir()
    assert newest_checkpoint(tmp_path).step == 1
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1, training())
    with pytest.raises(MismatchError, match="step-1"):
        put_back(newest_checkpoint(tmp_path), training(width=4))


def test_the_state_is_json_without_pickles(tmp_path):
    directory = save(tmp_path, 3, training())
    assert json.loads((directory / "state.json").read_text())["step"] == 3
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(("given", "total", "steps"), [(0, 10, 0), (3, 10, 3), (0.25, 10, 3), (0.3, 10, 3)])
def test_warm_up_below_1_is_a_fraction(given, total, steps):
    assert resolve_warmup(given, total) == steps


def test_weight_decay_spares_vectors():
    _, optimizer, _ = training()
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(5, 3): 0.01, (5,): 0.0}
