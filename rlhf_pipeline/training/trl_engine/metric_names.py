"""TRL's metrics under the names that the native loop logs."""

from __future__ import annotations

from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.training import TrainingConfig

_SAME = ("learning_rate", "grad_norm")
_SHARED = {
    "sft": ("entropy",),
    "reward": ("accuracy", "margin"),
    "dpo": (
        "entropy",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ),
}
_LOSS = {"sft": "loss/nll", "reward": "loss/bradley_terry", "dpo": "loss/dpo"}
_NOT_OURS = ("epoch", "loss", "step")


def native_names(stage: str, logs: dict[str, float], config: TrainingConfig) -> dict[str, float]:
    """One line of TRL's log with the native names; metrics without a native counterpart are under `trl/`.

    TRL reports Bradley-Terry and the centering term as one sum, which is logged as `loss`. The scores of chosen and
    rejected responses follow from their common mean m and their margin d: m + d/2 and m - d/2.
    """
    loss = "loss" if isinstance(config, RewardConfig) and config.center_rewards_coefficient else _LOSS[stage]
    metrics = {loss: logs["loss"]}
    shared = (*_SHARED[stage], *_SAME)
    metrics |= {name: float(logs[name]) for name in shared if name in logs}
    if stage == "reward":
        metrics["chosen_score"] = logs["mean_reward"] + logs["margin"] / 2
        metrics["rejected_score"] = logs["mean_reward"] - logs["margin"] / 2
    if isinstance(config, DpoConfig):
        metrics["logps/chosen_minus_reference"] = logs["rewards/chosen"] / config.beta
    rest = {name: value for name, value in logs.items() if name not in (*shared, *_NOT_OURS)}
    return metrics | {f"trl/{name}": float(value) for name, value in rest.items()}
