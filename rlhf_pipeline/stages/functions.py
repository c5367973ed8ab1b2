"""The function of every stage, by the name of its command."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_pipeline.stages.result import StageResult

FUNCTIONS = {
    "sft": "sft.run_sft",
    "train-rm": "reward.run_reward",
    "ppo": "ppo.run_ppo",
    "dpo": "dpo.run_dpo",
    "collect": "collect.run_collect",
}


def stage_function(stage: str) -> Callable[..., StageResult]:
    """The function that runs a stage, by its command name; only the module of this stage is imported."""
    module, _, function = FUNCTIONS[stage].partition(".")
    return getattr(import_module(f"rlhf_pipeline.stages.{module}"), function)
