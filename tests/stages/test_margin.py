"""The column `margin` of pairs: from its row to the loss of the reward model and of DPO."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.data import parsed
from rlhf_pipeline.errors import DataError, Interrupted
from rlhf_pipeline.training.windows import epoch_order
from tests.conftest import sigterm_at
from tests.training.conftest import word_pairs

STAGES = ("train-rm", "dpo")
LOSS = {"train-rm": "loss/bradley_terry", "dpo": "loss/dpo"}
PLAIN = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 0}


@pytest.fixture
def source(tmp_path):
    """Write pairs with a margin each, and return their file."""

    def write(margins: bool = True, **changes: object) -> str:
        rows = [row | ({"margin": margin_of(n), **changes} if margins else {}) for n, row in enumerate(word_pairs(20))]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def margin_of(number: int) -> float:
    return (number % 7) / 3 - 0.5


def whole(source: str, **changes: object) -> dict[str, object]:
    return {"dataset_name": source, "dataset_train_split": "all", "dataset_test_split": "all", **changes}


@pytest.mark.parametrize("stored", [False, True])
def test_the_first_loss_of_dpo_is_that_of_the_margins(lab, source, monkeypatch, stored):
    """At h = 0 a pair's loss is log(1 + e^m); the reported rewards are without the margin."""
    if stored:
        monkeypatch.setattr(parsed, "STORED_BYTES", 0)
    result = lab.run("dpo", **whole(source(), use_margin=True))
    first = lab.rows(result.run)[0]
    expected = sum(math.log1p(math.exp(margin_of(n))) for n in epoch_order(20, 0, 0)[:8]) / 8
    assert first["loss/dpo"] == pytest.approx(expected, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    manifest = lab.registry.resolve(result.model).manifest
    assert manifest.moves_optimum == {"use_margin": True}
    assert (
        "move the optimum away from pi_ref exp(r / beta): use_margin=True" in (Path(result.run) / "log.txt").read_text()
    )


@pytest.mark.check
@pytest.mark.parametrize("stage", STAGES)
def test_margins_of_0_change_nothing_and_others_do(lab, source, stage):
    plain = lab.run(stage, output_name="plain", **whole(source(margins=False)), max_steps=2)
    zero = lab.run(stage, output_name="zero", **whole(source(margin=0), use_margin=True), max_steps=2)
    some = lab.run(stage, output_name="some", **whole(source(), use_margin=True), max_steps=2)
    rows = [[row[LOSS[stage]] for row in lab.rows(result.run) if LOSS[stage] in row] for result in (plain, zero, some)]
    assert rows[0] == rows[1] and abs(rows[0][0] - rows[2][0]) > 1e-2
    unread = lab.run(stage, output_name="unread", **whole(source()), max_steps=2)
    assert [row[LOSS[stage]] for row in lab.rows(unread.run) if LOSS[stage] in row] == rows[0]
    log = (Path(unread.run) / "log.txt").read_text()
    assert "not read: margin" in log and "`use_margin: true` subtracts the column 'margin'" in log
    log = (Path(some.run) / "log.txt").read_text()
    assert "not read" not in log and "use_margin=True" in log


@pytest.mark.check
@pytest.mark.parametrize("stage", STAGES)
def test_a_margin_stays_with_its_pair_however_a_window_is_cut(lab, source, stage):
    file = whole(source(), use_margin=True, max_steps=3, **PLAIN)
    at_once = lab.run(stage, output_name="whole", **file)
    cut = lab.run(stage, output_name="cut", **file, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    ours, theirs = lab.weights(at_once.model), lab.weights(cut.model)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.check
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_reads_the_same_margins(lab, source, tmp_path, stage):
    settings = whole(source(), use_margin=True, max_steps=5, save_steps=2)
    other = lab.copy(tmp_path / "other")
    undisturbed = lab.run(stage, **settings)
    with sigterm_at(3), pytest.raises(Interrupted):
        other.run(stage, **settings)
    resumed = other.run(stage, **settings)
    ours, theirs = lab.weights(undisturbed.model), other.weights(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", STAGES)
def test_pairs_without_a_margin_are_named(lab, stage):
    with pytest.raises(DataError) as caught:
        lab.run(stage, use_margin=True)
    (fault,) = caught.value.faults
    assert re.fullmatch(r"no margin in (\d+) of \1 rows, which use_margin needs", fault.found)
    assert fault.where.startswith("collected:pairs@v1:")
    assert "use_margin: false" in fault.fix
