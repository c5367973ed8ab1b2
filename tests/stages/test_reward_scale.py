"""Scaled and normalised scores in a run: what is recorded, what a comparison says, and that it resumes bit for bit."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.compare.aim import aim_of
from tests.conftest import stopped_before

pytestmark = pytest.mark.check


def test_a_scaled_reward_is_a_beta_on_another_scale(lab):
    result = lab.run("ppo", reward_scale=2.0, max_steps=2)
    manifest = lab.registry.resolve(result.model).manifest
    assert manifest.moves_optimum == {"reward_scale": 2.0}
    assert all(row["objective/effective_kl_coef"] == 0.25 for row in lab.rows(result.run))
    aim = aim_of(lab.registry, lab.registry.resolve(result.model))
    assert (aim.optimum, aim.moved) == ("scale", {"reward_scale": 2.0, "effective_kl_coef": 0.25})
    slope = lab.registry.resolve("reward").manifest.metrics["calibration_slope"]["mean"]
    if aim.effective_beta is not None and aim.effective_beta.mean is not None:
        assert aim.effective_beta.mean == pytest.approx(0.25 * slope)
    plain = lab.run("ppo", output_name="plain", max_steps=1)
    first, other = lab.rows(result.run)[0], lab.rows(plain.run)[0]
    assert first["objective/scores"] == pytest.approx(2 * other["objective/scores"], rel=1e-5)
    clipped = lab.run("ppo", output_name="clipped", reward_scale=2.0, reward_clip=1.0, max_steps=1)
    assert aim_of(lab.registry, lab.registry.resolve(clipped.model)).optimum == "other"


def test_running_moments_are_those_of_all_scores_and_resume_bit_for_bit(lab):
    changes = {"normalize_rewards": True, "max_steps": 4, "save_steps": 1}
    whole = lab.run("ppo", output_name="whole", **changes)
    rows = lab.rows(whole.run)
    raw = [row["objective/raw_scores"] for row in rows]
    assert [row["objective/running_mean"] for row in rows] == pytest.approx(
        [sum(raw[: n + 1]) / (n + 1) for n in range(4)], abs=1e-9
    )
    assert rows[0]["objective/scores"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["objective/scores_std"] == pytest.approx(1, abs=1e-5)
    for row in rows:
        assert row["objective/effective_kl_coef"] == pytest.approx(0.5 * row["objective/running_std"], rel=1e-12)
    with stopped_before(3):
        lab.run("ppo", **changes)
    resumed = lab.run("ppo", **changes)
    assert lab.rows(resumed.run) == rows
    found, weights = lab.weights(resumed.model), lab.weights(whole.model)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
