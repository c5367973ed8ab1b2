"""From the scores of a rollout to the scores that are rewarded: their scale, clip and penalties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rlhf_pipeline.algorithms.moments import Moments
from rlhf_pipeline.rollout.rollout import apply_missing_eos_penalty, shape_scores
from rlhf_pipeline.training.ppo_batches import Scored
from rlhf_pipeline.training.ppo_rollouts import PpoSetup

EFFECTIVE = "objective/effective_kl_coef"
"""The metric of beta in units of the reward source's own scores."""


def shaped(setup: PpoSetup, scored: Scored) -> Scored:
    """The rollout with the scores that are rewarded, and the metrics of their scale.

        R' = clip(c (R - m) / s) - penalties        c: reward_scale; m, s: running mean and deviation, else 0 and 1

    With `normalize_rewards` the scores of this rollout, on all processes, are first added to the running moments. PPO
    on c R / s at kl_coef b has the optimum of R at b s / c. A deviation of 0 counts as 1.
    """
    config, rollout = setup.config, scored.rollout
    told: dict[str, float] = {}
    scores, scale = rollout.scores, config.reward_scale
    if config.normalize_rewards:
        found = Moments.of(scores, setup.reduce)
        setup.moments = setup.moments.merged(found)
        scores, scale = scores - setup.moments.mean, scale / (setup.moments.std or 1.0)
        told["objective/raw_scores"] = found.mean
        told |= {f"objective/running_{name}": getattr(setup.moments, name) for name in ("mean", "std")}
    if config.rescales:
        scores = scores * scale
        told[EFFECTIVE] = setup.kl_coef / scale
    lengths = rollout.mask.sum(1)
    scores = shape_scores(scores, lengths, clip=config.reward_clip, per_token=config.length_penalty)
    scores = apply_missing_eos_penalty(scores, rollout.ended, config.missing_eos_penalty)
    return replace(scored, rollout=replace(rollout, scores=scores), told=told)


def restored(metrics: Mapping[str, float]) -> Moments:
    """The running moments after the update with these metrics; those of no number without `normalize_rewards`."""
    if "objective/running_std" not in metrics:
        return Moments()
    return Moments(metrics["episodes"], metrics["objective/running_mean"], metrics["objective/running_std"])
