"""Sections of a comparison that never took place, from its rows."""

from __future__ import annotations

import math
import random
from typing import Any

from tests.experiment.report_fixture_rows import (
    ARMS,
    BETAS,
    OVER_BOTH,
    PROMPTS,
    SEEDS,
    SIZES,
    SPREAD,
    estimate,
    optimum,
)

STEPS = {"ppo": 160, "dpo": 600, "reward": 300}
WORDS = ["the", "plot", "was", "gripping", "slow", "and", "yet", "the acting", "felt", "warm", "never dull", ".", "!"]


def frontier(rows: list[dict[str, Any]]) -> dict[str, Any]:
    arms = {}
    for arm, share in ARMS.items():
        ours = [row for row in rows if row["arm"] == arm]
        ends = sorted(row["metrics"]["kl"]["mean"] for row in ours)
        grid = [ends[0] + (ends[-1] - ends[0]) * i / 24 for i in range(25)]
        line = [[kl, share * SPREAD * math.sqrt(2 * kl)] for kl in grid]
        arms[arm] = {
            "points": [
                {
                    "setting": row["setting"],
                    "seed": row["seed"],
                    "model": row["model"],
                    "kl": row["metrics"]["kl"],
                    "reward": row["metrics"]["true_reward"],
                }
                for row in ours
            ],
            "envelope": line,
            "band": [[kl, reward - 0.03 - 0.01 * kl, reward + 0.03 + 0.01 * kl] for kl, reward in line],
        }
    betas = [10 ** (2 - 0.05 * i) for i in range(70)]
    return {
        "figure": "true_reward",
        "arms": arms,
        "chosen_by": "judge",
        "matched_kl": 1.9,
        "common_range": [0.06, 5.6],
        "gibbs": {"kl": [optimum(beta)[0] for beta in betas], "reward": [optimum(beta)[1] for beta in betas]},
    }


def contrasts() -> list[dict[str, Any]]:
    made = [
        ("same beta", f"at beta {beta:g}", figure, estimate(mean * scale, 0.06 * scale, OVER_BOTH), 0.2)
        for beta, mean in zip(BETAS, (0.11, 0.05, 0.01, -0.004))
        for figure, scale in (("true_reward", 1.0), ("judge", 0.95), ("score", 1.04), ("kl", 0.3), ("length", -8.0))
    ]
    made += [
        ("matched KL", "at a KL of 1.90 nats", "true_reward", estimate(0.081, 0.046, OVER_BOTH), 0.008),
        ("matched KL", "at a KL of 1.90 nats", "judge", estimate(0.058, 0.05, OVER_BOTH), 0.031),
        ("area", "on average over KLs of 0.06 to 5.60 nats", "true_reward", estimate(0.064, 0.038, OVER_BOTH), 0.011),
        ("area", "on average over KLs of 0.06 to 5.60 nats", "judge", None, None),
    ]
    return [
        {
            "name": "ppo - dpo",
            "kind": kind,
            "a": "ppo",
            "b": "dpo",
            "figure": figure,
            "at": at,
            "estimate": found,
            "why_not": None if found else "not reached in 7 % of the replicates",
            "p": p,
            "p_holm": None if p is None or primary else min(1.0, 3 * p),
            "primary": primary,
        }
        for kind, at, figure, found, p in made
        for primary in [kind == "matched KL" and figure == "true_reward"]
    ]


def summary(trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each setting, with an interval that is wider than that over prompts."""
    made = []
    for arm in ARMS:
        for beta in BETAS:
            rows = [row for row in trained if row["arm"] == arm and row["beta"] == beta]
            means = {f: sum(row["metrics"][f]["mean"] for row in rows) / len(rows) for f in rows[0]["metrics"]}
            metrics = {figure: estimate(mean, 0.06 + 0.04 * abs(mean), OVER_BOTH) for figure, mean in means.items()}
            made.append(
                {
                    "arm": arm,
                    "setting": {"beta": beta},
                    "beta": beta,
                    "seeds": 3,
                    "metrics": metrics,
                    "method": OVER_BOTH,
                }
            )
    return made


def _curve(rng: random.Random, steps: int, start: float, end: float, noise: float) -> list[list[float]]:
    every = max(1, steps // 160)
    return [
        [step, end + (start - end) * math.exp(-4 * step / steps) + rng.gauss(0, noise)]
        for step in range(1, steps + 1, every)
    ]


def curves(rng: random.Random, rows: list[dict[str, Any]]) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for row in rows:
        if row["arm"] not in ARMS:
            continue
        kl, reward = row["metrics"]["kl"]["mean"], row["metrics"]["score"]["mean"]
        if row["arm"] == "ppo":
            shape = {
                "objective/scores": (0.0, reward, 0.05),
                "objective/kl": (0.0, kl, 0.04),
                "objective/rlhf_reward": (0.0, reward - row["beta"] * kl, 0.05),
                "val/response_length": (9.0, 9.0 + 0.25 * kl, 0.1),
                "val/ended": (0.96, 0.965, 0.006),
                "val/explained_variance": (-0.3, 0.72, 0.04),
            }
        else:
            shape = {
                "rewards/accuracies": (0.5, 0.71, 0.03),
                "rewards/margins": (0.0, 0.8, 0.05),
                "logps/chosen_minus_reference": (0.0, -0.9, 0.05),
                "loss/dpo": (0.69, 0.55, 0.015),
            }
        curves[row["model"]] = {name: _curve(rng, STEPS[row["arm"]], *ends) for name, ends in shape.items()}
    for seed in SEEDS:
        curves[f"reward-{seed}@v1"] = {
            "accuracy": _curve(rng, STEPS["reward"], 0.5, 0.69, 0.02),
            "loss/bradley_terry": _curve(rng, STEPS["reward"], 0.69, 0.58, 0.01),
        }
    return curves


def overoptimisation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for arm, (alpha, slope) in {"ppo": (1.02, 0.19), "dpo": (0.95, 0.3)}.items():
        points = []
        for row in rows:
            if row["arm"] == arm:
                d = math.sqrt(row["metrics"]["kl"]["mean"])
                points.append([d, 0.9 * d, d * (alpha - slope * math.log(d))])
        made[arm] = {
            "points": points,
            "fit": {
                "form": "rl",
                "alpha": alpha,
                "beta": slope,
                "peak": None,
                "least": 0.5,
                "largest": max(point[0] for point in points),
            },
            "gold": "true_reward",
            "why": "the fitted curve has no peak inside the data, d = 0.50 to 2.34",
            "found": False,
        }
    points = []
    for n in SIZES[1:]:
        d = math.sqrt(math.log(n) - (n - 1) / n)
        points.append([d, 0.95 * d, d * (1.1 - 0.38 * d)])
    made["best-of-n"] = {
        "points": points,
        "fit": {
            "form": "bon",
            "alpha": 1.1,
            "beta": 0.38,
            "peak": 1.1 / 0.76,
            "least": points[0][0],
            "largest": points[-1][0],
        },
        "found": True,
    }
    return made


def preferences() -> dict[str, Any]:
    def bins(bias: float) -> list[list[float]]:
        return [[0.5 + 0.033 * i, min(1.0, 0.5 + 0.033 * i * bias + 0.01 * (-1) ** i), 64] for i in range(1, 16)]

    scorers: dict[str, Any] = {}
    for s in SEEDS:
        found = {"ece": 0.02 + 0.002 * s, "nll": 0.566, "brier": 0.193, "bins": bins(0.96 + 0.02 * s)}
        scorers[f"reward-{s}@v1"] = {"accuracy": estimate(0.704 - 0.004 * s, 0.024), **found}
    for i, _ in enumerate(BETAS):
        found = {"ece": 0.064, "nll": 0.601, "brier": 0.207, "bins": bins(0.79 + 0.05 * i)}
        scorers[f"dpo-{i}-0@v1"] = {"accuracy": estimate(0.681 - 0.005 * i, 0.025), **found}
    scorers["longer wins"] = {"accuracy": estimate(0.521, 0.03), "ece": None, "nll": None, "brier": None, "bins": []}
    return {
        "pairs": 960,
        "prompts": 240,
        "scorers": scorers,
        "test": {
            "name": "reward-0@v1 (explicit) - dpo-0-0@v1 (implicit)",
            "method": "clustered bootstrap",
            "difference": estimate(0.023, 0.019),
            "p": 0.018,
        },
    }


def exact(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = []
    for row in rows:
        if row["arm"] not in ARMS:
            continue
        kl, beta = row["metrics"]["kl"]["mean"], row["beta"]
        reward = ARMS[row["arm"]] * SPREAD * math.sqrt(2 * kl)
        best_kl, best_reward = optimum(beta)
        attainable = best_reward - beta * best_kl
        gap = attainable - (reward - beta * kl)
        entry = {
            "name": row["model"],
            "model": row["model"],
            "stage": row["stage"],
            "digest": row["digest"],
            "beta": beta,
            "reward": reward,
            "kl": kl,
            "objective": reward - beta * kl,
            "gap": gap,
            "attainable": attainable,
            "share": 1 - gap / attainable,
            "prompts": PROMPTS,
            "gap_true": {"value": gap, "prompts": PROMPTS},
            "training_loss": {"excess": 0.004} if row["arm"] == "dpo" else None,
        }
        other = "optimisation_gap" if row["arm"] == "ppo" else "disagreement"
        entry[other] = {"value": gap * 0.4, "prompts": 4}
        made.append(entry)
    for beta in BETAS:
        kl, reward = optimum(beta)
        figures = {"reward": reward, "kl": kl, "objective": reward - beta * kl, "share": 1.0}
        made.append(
            {"name": "optimum", "model": None, "stage": "optimum", "digest": None, "beta": beta, **figures}
            | {"gap_true": {"value": 0.0, "prompts": PROMPTS}, "training_loss": None}
        )
    return {
        "reward": "world",
        "reference": "sft@v1",
        "reward_model": "reward-0@v1",
        "prompts": PROMPTS,
        "reward_model_prompts": 4,
        "responses": 954305,
        "temperature": 1.0,
        "rows": made,
        "best_of_n": [
            {"n": n, "chosen_by": "reward-0@v1", "prompts": 4}
            | {"reward": 0.3 * math.log(n), "kl": 0.9 * (math.log(n) - 1 + 1 / n)}
            for n in SIZES
        ],
        "frontier": {"beta": [1.0], "reward": [optimum(1.0)[1]], "kl": [optimum(1.0)[0]]},
    }


def samples(rng: random.Random, names: list[str]) -> list[dict[str, Any]]:
    def response() -> dict[str, Any]:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 14)))
        figures = {name: rng.gauss(0.5, 0.6) for name in ("true_reward", "score", "judge")}
        return {"text": text, "ended": rng.random() < 0.9, **figures}

    prompts = ("the plot of this drama was", "overall the film", "a short verdict on the acting :")
    return [{"prompt": prompt, "responses": {name: [response()] for name in names}} for prompt in prompts]
