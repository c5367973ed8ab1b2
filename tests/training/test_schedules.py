"""The learning-rate schedules are transformers' own, step by step."""

import pytest
import torch
from torch import nn

from rlhf_pipeline.training.optimizer import make_scheduler, rate_factor

TOTAL = 40


def rates(schedule, optimizer):
    found = []
    for _ in range(TOTAL + 3):  # beyond its end too
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 0.1, TOTAL])
def test_equals_transformers_schedule(name, warmup):
    from transformers import get_scheduler

    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4) for _ in range(2))
    steps = 4 if warmup == 0.1 else warmup
    expected = get_scheduler(name, theirs, num_warmup_steps=steps, num_training_steps=TOTAL)
    assert rates(make_scheduler(ours, name, warmup_steps=warmup, total=TOTAL), ours) == rates(expected, theirs)


def test_linear_by_hand():
    assert [rate_factor("linear", step, warmup=2, total=6) for step in range(8)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="polynomial"):
        rate_factor("polynomial", 0, warmup=0, total=1)
