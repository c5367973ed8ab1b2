"""When a run evaluates and writes checkpoints."""

from __future__ import annotations

import pytest

from rlhf_pipeline.training.session import is_due


@pytest.mark.parametrize(
    ("strategy", "every", "expected"),
    [
        ("no", 2, []),
        ("steps", None, []),
        ("steps", 4, [4, 8]),
        ("steps", 0.3, [3, 6, 9]),  # ceil(.3 x 10) = 3
        ("steps", 0.01, list(range(1, 11))),
        ("epoch", None, [3, 6, 9]),  # a third of an epoch per step
        ("epoch", 4, [3, 6, 9]),
    ],
)
def test_steps_that_are_due_in_a_run_of_ten(strategy, every, expected):
    assert [step for step in range(1, 11) if is_due(strategy, every, step, 10, step / 3)] == expected
