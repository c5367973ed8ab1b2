"""TR-DPO: when and how far the reference moves, also over a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_pipeline.errors import Interrupted, MismatchError
from rlhf_pipeline.stages.moving_reference import following
from tests.conftest import sigterm_at

MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}


class Holder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def weight_at(start: int, steps: int, policy_at: list[float], reference: float) -> tuple[list[float], Holder]:
    """The weight of the reference at each window, with every = 2 and share = .6; the policy moves after each."""
    policy, frozen = (Holder(nn.Linear(1, 1, bias=False)) for _ in range(2))
    frozen.requires_grad_(False)
    policy.model.weight.data.fill_(policy_at[start])
    frozen.model.weight.fill_(reference)
    windows = following(lambda _, first: iter(range(first, steps)), policy, frozen, share=0.6, every=2)
    seen = []
    for window in windows(None, start):
        seen.append(frozen.model.weight.item())
        policy.model.weight.data.fill_(policy_at[window + 1])
    return seen, policy


def test_the_reference_moves_every_other_step_by_its_share():
    """By hand: at updates 2 and 4 it becomes .6 theta + .4 ref, with the policy as it is after those updates."""
    policy = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    second, fourth = 0.6 * 2.0, 0.6 * 4.0 + 0.4 * 1.2
    found, holder = weight_at(0, 6, policy, 0.0)
    assert found == pytest.approx([0.0, 0.0, second, second, fourth, fourth], abs=1e-6)
    assert dict(holder.named_buffers())["reference weight"].item() == pytest.approx(fourth, abs=1e-6)
    # A checkpoint after update 4 holds the reference before its move; one after update 3 between two moves.
    assert weight_at(4, 6, policy, second)[0] == pytest.approx([fourth, fourth], abs=1e-6)
    assert weight_at(3, 6, policy, second)[0] == pytest.approx([second, fourth, fourth], abs=1e-6)


def test_a_reference_of_another_shape_cannot_move():
    policy, frozen = Holder(nn.Linear(1, 1)), Holder(nn.Linear(2, 1))
    with pytest.raises(MismatchError, match="weights of other shapes"):
        following(lambda *_: iter(()), policy, frozen, share=0.5, every=1)


def test_the_loss_is_measured_to_the_reference_that_has_moved(lab):
    rows = lab.rows(lab.run("dpo", max_steps=4, **{**MOVES, "ref_model_mixup_alpha": 1.0}).run)
    margins = [abs(row["rewards/margins"]) for row in rows]
    assert margins[2] < 1e-5 < margins[1]  # with share 1 the reference becomes the policy after two updates
    assert margins[3] > 1e-5


@pytest.mark.check
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_has_the_same_weights_bit_for_bit(lab, stop):
    """Stopped at a step at which the reference moves, and between two."""
    settings = {"max_steps": 6, **MOVES}
    whole = lab.run("dpo", output_name="whole", **settings)
    with pytest.raises(Interrupted), sigterm_at(stop):
        lab.run("dpo", output_name="parts", **settings)
    parts = lab.run("dpo", output_name="parts", **settings)
    one, other = lab.weights(whole.model), lab.weights(parts.model)
    assert set(one) == set(other) and not any(name.startswith("reference") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [
        [{k: v for k, v in row.items() if k.startswith(("loss", "rewards"))} for row in lab.rows(r.run)]
        for r in (whole, parts)
    ]
    assert rows[0] == rows[1]
