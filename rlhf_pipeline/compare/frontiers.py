"""Reward against KL for every arm, the exact frontier if it is known, and over-optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from rlhf_pipeline.compare.arms import Arm, common_seeds
from rlhf_pipeline.compare.rows import Measured
from rlhf_pipeline.evaluation.frontier import common_range, reward_at
from rlhf_pipeline.evaluation.overoptimisation import fit_gain, overoptimised
from rlhf_pipeline.report.figures import Exact, Interval
from rlhf_pipeline.report.sides import Frontier, FrontierArm, FrontierPoint, GaoFit, Overoptimised

BAND_POINTS = 15
BAND_RESAMPLES = 500


def _points(arm: Arm, figure: str) -> list[FrontierPoint]:
    return [
        FrontierPoint(
            setting=setting.values,
            step=setting.step,
            seed=seed,
            model=point.name,
            kl=Interval.of(point.test.estimate("kl")),
            reward=Interval.of(point.test.estimate(figure)),
        )
        for setting, points in arm.points.items()
        for seed, point in points.items()
    ]


def _arm(arm: Arm, figure: str, chooser: str | None) -> FrontierArm:
    """Points of an arm, the envelope of the means over seeds, and its interval at KLs that every seed reaches."""
    points, seeds = _points(arm, figure), common_seeds(arm)
    if not seeds or len(arm.complete(seeds)) < 2:
        return FrontierArm(points=points, envelope=[], band=[])
    curve = arm.curve(seeds, figure, chooser)
    x, y = (values.mean(0) for values in curve.means())
    shared, band = common_range(curve), list[tuple[float, float | None, float | None]]()
    for at in () if shared is None else np.linspace(*shared, BAND_POINTS):
        reading = reward_at(curve, float(at), name=arm.name, resamples=BAND_RESAMPLES)
        if reading.inference is not None:
            band.append((float(at), reading.inference.estimate.low, reading.inference.estimate.high))
    envelope = sorted((float(kl), float(reward)) for kl, reward in zip(x, y, strict=True))
    return FrontierArm(points=points, envelope=envelope, band=band)


def frontier_section(arms: Sequence[Arm], figure: str, chooser: str | None, exact: Exact | None) -> Frontier | None:
    """The frontiers of the arms on the test prompts, by samples of the policies themselves; None without KL."""
    arms = [arm.sampled for arm in arms]
    if any(
        "kl" not in point.test.values for arm in arms for points in arm.points.values() for point in points.values()
    ):
        return None
    curves = [arm.curve(common_seeds(arm), figure, chooser) for arm in arms if common_seeds(arm)]
    shared = common_range(*curves) if len(curves) == len(arms) > 1 else None
    known = figure == "true_reward" and exact is not None and exact.reward == "world"
    return Frontier(
        figure=figure,
        chosen_by=chooser,
        arms={arm.name: _arm(arm, figure, chooser) for arm in arms},
        matched_kl=None if shared is None else sum(shared) / 2,
        common_range=shared,
        gibbs=exact.frontier if exact is not None and known else None,
    )


def _start(reference: Measured, arm: Arm, seed: int | None) -> np.ndarray:
    """The reference's mean score on each prompt, (P,), by the reward model of an arm's seed."""
    samples = reference.scored_by(next(iter(arm.finals.points.values()))[seed].scorer)
    return samples.by_prompt("score").mean(1)


def over_optimisation_section(arms: Sequence[Arm], reference: Measured | None) -> dict[str, Overoptimised] | None:
    """For each arm, the gains of the proxy and of the gold reward over the reference, against sqrt(KL).

    The proxy is the training reward model's score; the gold reward is the true reward, else the judge's score. The form
    of Gao et al. 2022, eq. 1, is fitted to the gold reward only.

    Args:
        reference: the model that KL is measured to, on the same prompts; only the gain over this model is 0 at KL 0.
    """
    if reference is None:
        return None
    reference, arms = reference.sampled, [arm.sampled for arm in arms]
    gold = next((name for name in ("true_reward", "judge") if name in reference.test.values), None)
    if gold is None or "score" not in reference.test.values or "kl" not in reference.test.values:
        return None
    found = {}
    for arm in arms:
        seeds = common_seeds(arm)
        if not seeds:
            continue
        kl, proxy, real = (arm.stacked(seeds, name) for name in ("kl", "score", gold))
        distance = np.sqrt(kl.mean((0, 2)).clip(min=0.0))
        start = np.stack([_start(reference, arm, seed) for seed in seeds])[:, None]  # by the reward model of each seed
        proxy_gain, gain = proxy - start, real - reference.values(gold)
        fitted = fit_gain("rl", distance, gain.mean((0, 2)))
        verdict = overoptimised(distance, proxy_gain, gain, fitted)
        rows = zip(distance, proxy_gain.mean((0, 2)), gain.mean((0, 2)), strict=True)
        found[arm.name] = Overoptimised(
            gold=gold,
            reference=reference.name,
            points=sorted((float(d), float(mine), float(wanted)) for d, mine, wanted in rows),
            fit=None if fitted is None else GaoFit(**asdict(fitted)),
            found=verdict.found if fitted is not None else None,
            why=verdict.why,
            p=verdict.p,
        )
    return found
