"""Rows of a comparison that never took place.

Rewards of responses are Gaussian with standard deviation SPREAD under the reference, so the optima are known:
KL = SPREAD^2 / (2 beta^2) and reward = SPREAD sqrt(2 KL). Arms stay below by a loss of their own.
"""

from __future__ import annotations

import math
import random
from typing import Any

ARMS = {"ppo": 0.93, "dpo": 0.86}  # share of the optimum's reward at the same KL
BETAS = (0.1, 0.3, 1.0, 3.0)
SEEDS = (0, 1, 2)
SPREAD = 0.62
PROMPTS, SAMPLES = 256, 4
SIZES = (1, 2, 4, 8, 16, 32, 64)

OVER_BOTH = "t over seeds and prompts"


def estimate(mean: float, half: float, method: str = "bootstrap") -> dict[str, Any]:
    """An estimate as results.json has it."""
    clusters = len(SEEDS) if method == OVER_BOTH else PROMPTS
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "n": PROMPTS * SAMPLES,
        "clusters": clusters,
        "method": method,
    }


def optimum(beta: float) -> tuple[float, float]:
    """(KL, reward) of the optimal policy."""
    kl = SPREAD**2 / (2 * beta**2)
    return kl, SPREAD * math.sqrt(2 * kl)


def _kl(beta: float) -> float:
    """What training reaches of the optimum's KL: all of a small one, less of a large one."""
    kl = optimum(beta)[0]
    return kl / (1 + 0.14 * kl)


def cost_of(arm: str) -> dict[str, Any]:
    ppo = arm == "ppo"
    parts = {"reward model": 2.1e12, "sampling": 0.9e12, "scoring": 1.6e12, "updates": 7.8e12}
    parts = parts if ppo else {"reference": 0.7e12, "updates": 3.2e12}
    return {
        "wall_seconds": 218.0 if ppo else 71.5,
        "flops": sum(parts.values()),
        "flops_by_part": parts,
        "tokens_trained": 1.31e6 if ppo else 5.2e5,
        "tokens_generated": 2.6e5 if ppo else 0.0,
        "optimizer_steps": 2560.0 if ppo else 600.0,
        "peak_memory_bytes": 7.3e8 if ppo else 4.9e8,
    }


def trained_row(rng: random.Random, arm: str, beta: float, seed: int) -> dict[str, Any]:
    kl = _kl(beta) * (1 + rng.gauss(0, 0.05))
    reward = ARMS[arm] * SPREAD * math.sqrt(2 * kl) + rng.gauss(0, 0.02)
    proxy = reward * 1.04 + 0.03 * kl
    length = 9.0 + (0.7 if arm == "dpo" else 0.25) * kl
    label = f"{arm}-{BETAS.index(beta)}-{seed}@v1"
    cost = {key: value for key, value in cost_of(arm).items() if key != "flops_by_part"}
    cost["flops"] *= 1 + 0.02 * rng.random()
    cost["wall_seconds"] *= 1 + 0.2 * rng.random()
    return {
        "name": label,
        "arm": arm,
        "seed": seed,
        "setting": {"beta": beta},
        "model": label,
        "stage": arm,
        "digest": f"{rng.getrandbits(256):064x}",
        "beta": beta,
        "metrics": {
            "true_reward": estimate(reward, 0.05),
            "judge": estimate(0.95 * reward, 0.06),
            "score": estimate(proxy, 0.06),
            "kl": estimate(kl, 0.03 + 0.03 * kl),
            "kl_k1": estimate(kl * 1.01, 0.05 + 0.05 * kl),
            "kl_k3": estimate(kl * 0.99, 0.05 + 0.05 * kl),
            "length": estimate(length, 0.3),
            "ended": estimate(0.97 - 0.01 * kl, 0.01),
            "well_formed": estimate(0.93 + 0.01 * kl, 0.015),
            "entropy": estimate(14.2 - 1.7 * kl, 0.4),
        },
        "per_prompt": {"true_reward": [reward + rng.gauss(0, 0.4) for _ in range(8)]},
        "validation": {"true_reward": estimate(reward + rng.gauss(0, 0.02), 0.05)},
        "win_rate": estimate(0.5 + 0.36 * math.tanh(reward), 0.03),
        "difference": estimate(reward, 0.05),
        "gain_in_sd": reward / SPREAD,
        "cost": cost,
        "diversity": {
            "distinct_1": 0.05 - 0.003 * kl,
            "distinct_2": 0.31 - 0.03 * kl,
            "distinct_4": 0.83 - 0.07 * kl,
            "self_bleu": 0.21 + 0.06 * kl,
            "tokens": 4000,
        },
    }


def baseline_row() -> dict[str, Any]:
    zero = estimate(0.0, 0.0)
    return {
        "name": "sft@v1",
        "arm": "sft",
        "seed": None,
        "setting": {},
        "model": "sft@v1",
        "stage": "sft",
        "digest": "5f" * 32,
        "beta": None,
        "metrics": {
            "true_reward": estimate(0.0, 0.05),
            "judge": estimate(0.01, 0.05),
            "score": estimate(-0.01, 0.05),
            "kl": zero,
            "kl_k1": zero,
            "kl_k3": zero,
            "length": estimate(9.0, 0.3),
            "ended": estimate(0.972, 0.01),
            "well_formed": estimate(0.93, 0.015),
            "entropy": estimate(14.2, 0.4),
        },
        "per_prompt": {},
        "validation": None,
        "cost": {},
        "diversity": {"distinct_1": 0.05, "distinct_2": 0.31, "distinct_4": 0.83, "self_bleu": 0.21, "tokens": 4000},
    }


def best_of_n_rows() -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        bound = math.log(n) - (n - 1) / n
        reward = 0.88 * SPREAD * math.sqrt(2 * bound)
        rows.append(
            {
                "name": f"best of {n} of sft@v1",
                "arm": "best-of-n",
                "seed": None,
                "setting": {},
                "model": "sft@v1",
                "stage": "best-of-n",
                "n": n,
                "chosen_by": "reward@v1",
                "kl_bound": bound,
                "metrics": {
                    "true_reward": estimate(reward, 0.05),
                    "judge": estimate(0.95 * reward, 0.06),
                    "score": estimate(1.05 * reward, 0.05),
                    "length": estimate(9.0 + 0.05 * n**0.5, 0.3),
                    "ended": estimate(0.97, 0.01),
                },
                "win_rate": estimate(0.5 + 0.36 * math.tanh(reward), 0.03),
                "cost": {},
            }
        )
    return rows
