"""Steps that vanish in the rounding of bfloat16 are named; in fp32 the same steps move nearly every weight."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.training.rounding import SAMPLE, changed_share, sample_weights


def test_a_step_below_half_the_spacing_of_bfloat16_changes_nothing():
    """Below 1 the spacing of bfloat16 is 2^-8: 1 - 2^-9 is a tie, which rounds to 1; 1 - 2^-8 stays."""
    weights = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in (30, 10)]
    weights.append(torch.nn.Parameter(torch.ones(99)))  # more bits
    weights.append(torch.nn.Parameter(torch.ones(99, dtype=torch.bfloat16), requires_grad=False))
    sample = sample_weights(weights)
    assert changed_share(sample) == 0
    with torch.no_grad():
        weights[0] -= 2.0**-9
        assert changed_share(sample) == 0
        weights[1] -= 2.0**-8
    assert changed_share(sample) == 10 / 40
    assert sample_weights(weights[2:]) == []


def test_a_large_tensor_is_sampled_over_its_whole_length():
    large = torch.nn.Parameter(torch.zeros(100, SAMPLE, dtype=torch.bfloat16))
    sample = sample_weights([large])
    assert sample[0][1].numel() == SAMPLE
    with torch.no_grad():
        large[50:] = 1
    assert changed_share(sample) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_whose_steps_vanish_names_the_cause(lab, stage):
    steps = {"learning_rate": 1e-6, "max_steps": 6}
    result = lab.run(stage, dtype="bfloat16", **steps)
    found = {finding["cause"]: finding for finding in result.metrics["health"]}
    assert found["weights_stuck"]["value"] < 0.05 and found["weights_stuck"]["since_step"] == 2
    rows = lab.rows(result.run)
    assert ["weights/changed" in row for row in rows if "grad_norm" in row] == [False] + [True] * 5
    whole = lab.run(stage, **steps)
    assert "weights_stuck" not in {finding["cause"] for finding in whole.metrics["health"]}
    assert not any("weights/changed" in row for row in lab.rows(whole.run))
