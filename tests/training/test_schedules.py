"""The learning-rate schedules are transformers' own, step by step; PPO's begins above 0."""

import pytest
import torch
from torch import nn

from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.training.optimizer import make_scheduler, rate_factor, resolve_warmup

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


OTHERS = [
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.25}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 10, "num_stable_steps": 5, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
    ),
]


@pytest.mark.parametrize(("name", "kwargs"), OTHERS)
@pytest.mark.parametrize("warmup", [0, 7])
def test_every_other_schedule_equals_transformers_with_its_arguments(name, kwargs, warmup):
    from transformers import get_scheduler

    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4) for _ in range(2))
    expected = get_scheduler(
        name, theirs, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=dict(kwargs)
    )
    found = make_scheduler(ours, name, warmup_steps=warmup, total=TOTAL, arguments=kwargs)
    assert rates(found, ours) == rates(expected, theirs)


def test_the_rate_of_warmup_stable_decay_by_hand():
    """Warm-up of 2, 3 steps of the full rate, 4 of linear decay to 0; PPO's begins at 1/3."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"warmup_steps": 2, "total": 9, "arguments": {"num_decay_steps": 4, "decay_type": "linear"}}
    schedule = make_scheduler(optimizer, "warmup_stable_decay", **options)
    found = [factor(step) for factor in schedule.lr_lambdas for step in range(10)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    first = make_scheduler(optimizer, "warmup_stable_decay", **options, offset=1).lr_lambdas[0]
    assert [first(step) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_a_schedule_that_measures_keeps_its_rate_between_evaluations():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = {"factor": 0.5, "patience": 1}
    schedule = make_scheduler(optimizer, "reduce_lr_on_plateau", warmup_steps=0, total=9, arguments=arguments)
    found = []
    for value in (3.0, 2.0, 2.0, 2.0, 1.0):  # two evaluations in a row that are not better
        schedule.step()
        found.append(schedule.get_last_lr()[0])
        schedule.measured(value)
    assert found == [1, 1, 1, 1, 0.5]


def test_a_value_that_transformers_refuses_is_a_fault_of_the_config():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = {"num_decay_steps": 4, "decay_type": "square"}
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs: transformers refuses .*square"):
        make_scheduler(optimizer, "warmup_stable_decay", warmup_steps=0, total=9, arguments=arguments)


def test_linear_by_hand():
    assert [rate_factor("linear", step, warmup=2, total=6) for step in range(8)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("warmup_steps", "total", "expected"),
    [(0.15, 9, 2), (0.1, 1, 1), (0.1, 10, 1), (0.1, 11, 2), (0.5, 3, 2), (0, 9, 0), (1, 9, 1), (7, 9, 7)],
)
def test_a_fraction_of_the_steps_is_rounded_up(warmup_steps, total, expected):
    assert resolve_warmup(warmup_steps, total) == expected


def test_a_fraction_is_as_many_steps_as_in_transformers(tmp_path):
    from transformers import TrainingArguments

    for warmup_steps in (0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 1 / 3, 0.99):
        theirs = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup_steps)
        for total in range(1, 121):
            assert resolve_warmup(warmup_steps, total) == theirs.get_warmup_steps(total), (warmup_steps, total)


def test_with_an_offset_of_1_no_step_of_a_warm_up_has_rate_0():
    options = {"warmup": 3, "total": 7, "offset": 1}
    found = [rate_factor("linear", step, **options) for step in range(8)]
    assert found == [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
    assert [rate_factor("constant_with_warmup", step, **options) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("warmup_steps", [1, 0.1])
def test_a_run_whose_only_step_would_have_rate_0_is_refused(warmup_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    with pytest.raises(ConfigError, match=r"warmup_steps: found .* in a run of one step"):
        make_scheduler(optimizer, "linear", warmup_steps=warmup_steps, total=1)
    assert make_scheduler(optimizer, "linear", warmup_steps=1, total=1, offset=1).get_last_lr() == [1.5e-4]


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="polynomial"):
        rate_factor("polynomial", 0, warmup=0, total=1)
