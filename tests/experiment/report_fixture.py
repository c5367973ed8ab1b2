"""Results of comparisons that never took place: everything that results.json can hold, and as little as it can."""

from __future__ import annotations

import random
from typing import Any

from tests.experiment.report_fixture_rows import (
    ARMS,
    BETAS,
    PROMPTS,
    SAMPLES,
    SEEDS,
    baseline_row,
    best_of_n_rows,
    cost_of,
    estimate,
    trained_row,
)
from tests.experiment.report_fixture_sections import (
    contrasts,
    curves,
    exact,
    frontier,
    overoptimisation,
    preferences,
    samples,
    summary,
)

CONFIG = """stage: {stage}
model_name_or_path: sft@v1
dataset_name: collected:pairs@v1
output_name: {name}
beta: {beta:g}
learning_rate: 0.0003
lr_scheduler_type: linear
per_device_train_batch_size: 64
response_length: 16
seed: {seed}
"""


def full(seed: int = 0) -> dict[str, Any]:
    """Two arms at four betas with three seeds, best of n, and every section."""
    rng = random.Random(seed)
    trained = [trained_row(rng, arm, beta, s) for arm in ARMS for beta in BETAS for s in SEEDS]
    rows, best = [baseline_row(), *trained], best_of_n_rows()
    lineage = [
        {"model": "sft@v1", "digest": "5f" * 32, "stage": "sft", "parents": {}},
        {"model": "pairs@v1", "digest": "9a" * 32, "stage": "collect", "parents": {"policy": "sft@v1"}},
    ]
    lineage += [
        {"model": f"reward-{s}@v1", "digest": f"{s}c" * 32, "stage": "reward", "parents": {"base": "sft@v1"}}
        for s in SEEDS
    ]
    for row in trained:
        parents = {"base": "sft@v1", "reference": "sft@v1", "data": "pairs@v1"}
        parents |= {"reward_model": f"reward-{row['seed']}@v1"} if row["arm"] == "ppo" else {}
        lineage.append({"model": row["model"], "digest": row["digest"], "stage": row["stage"], "parents": parents})
    return {
        "name": "frontier",
        "path": "rlhf_home/reports/frontier/results.json",
        "command": "rlhf run configs/demo/frontier.yaml",
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "split": "test",
        "validation_split": "validation",
        "temperature": 1.0,
        "seed": 0,
        "response_length": 16,
        "prompt_texts": ["the plot of this drama was", "overall the film"],
        "reference": "sft@v1",
        "reward_model": "reward-0@v1",
        "judge": "judge@v1",
        "baseline": "sft@v1",
        "primary": "true_reward",
        "seeds": list(SEEDS),
        "resampled": ["reward", "ppo", "dpo"],
        "comparable": {
            "ok": False,
            "differences": [{"what": "training prompts", "values": {"ppo": "3,840 prompts", "dpo": "3,712 prompts"}}],
            "allowed": True,
        },
        "rows": [*rows, *best],
        "arms": {
            arm: {
                "trials": len(BETAS),
                "settings": [{"beta": beta} for beta in BETAS],
                "selected": {"beta": 0.3},
                "cost": cost_of(arm),
            }
            for arm in ARMS
        },
        "summary": summary(trained),
        "contrasts": contrasts(),
        "win_rates": [
            {
                "a": "ppo",
                "b": "dpo",
                "figure": "true_reward",
                "estimate": estimate(0.547, 0.028),
                "ties": 0.15,
                "length_controlled": {"estimate": estimate(0.561, 0.034), "why_not": None},
            },
            {
                "a": "ppo",
                "b": "demonstrations",
                "figure": "judge",
                "estimate": estimate(0.702, 0.03),
                "length_controlled": {"estimate": None, "why_not": "all lengths agree"},
            },
        ],
        "ranking": {
            "figure": "true_reward",
            "separable": False,
            "left_out": 0,
            "rows": [
                {
                    "name": row["name"],
                    "elo": estimate(1000 + 180 * row["metrics"]["true_reward"]["mean"], 22),
                    "bound": None,
                    "ties": 0.12,
                }
                for row in rows
            ],
        },
        "frontier": frontier(trained),
        "overoptimisation": overoptimisation(trained),
        "best_of_n": best,
        "preferences": preferences(),
        "samples_shown": samples(rng, [row["name"] for row in rows]),
        "curves": curves(rng, trained),
        "exact": exact(trained),
        "lineage": lineage,
        "configs": {
            row["model"]: CONFIG.format(stage=row["stage"], name=row["arm"], beta=row["beta"], seed=row["seed"])
            for row in trained
        },
        "verdict": {
            "headline": "Ppo is ahead of dpo in true reward at a KL of 1.90 nats: ppo - dpo = +0.081 [+0.035, +0.127]",
            "certain": True,
            "lines": [
                line("matched KL", "ppo is ahead of dpo in true reward on average over KLs of 0.06 to 5.60 nats"),
                line("judge", "ppo is ahead of dpo in the judge's score at a KL of 1.90 nats: +0.058 [+0.008, +0.108]"),
                line(
                    "cost",
                    "cannot tell ppo from dpo in true reward at 4 TFLOP: +0.012 [-0.050, +0.074]; about 11 seeds would "
                    "settle it if the difference stayed what it is",
                    certain=False,
                ),
                line("limits", "PPO is 0.081 short of the optimum of the true reward; the reward model limits it more"),
                line("limits", "DPO is 0.142 short of the optimum of the true reward"),
                line("next", "for PPO: more or fresher preference pairs, or a larger reward model", certain=False),
            ],
        },
    }


def line(topic: str, text: str, certain: bool = True) -> dict[str, Any]:
    """A line of a verdict."""
    return {"topic": topic, "text": text, "certain": certain}


def minimal() -> dict[str, Any]:
    """One arm and its baseline on eight prompts, as a plain comparison of two references writes it."""
    row = trained_row(random.Random(1), "dpo", 0.3, 0)
    return {
        "name": "small",
        "primary": "true_reward",
        "baseline": "sft@v1",
        "reference": "sft@v1",
        "reward_model": None,
        "prompts": 8,
        "samples": 4,
        "split": "test",
        "temperature": 1.0,
        "seed": 0,
        "rows": [
            {key: baseline_row()[key] for key in ("name", "model", "stage", "digest", "metrics")},
            {key: row[key] for key in ("model", "stage", "digest", "beta", "metrics", "cost")} | {"name": "dpo@v1"},
        ],
    }
