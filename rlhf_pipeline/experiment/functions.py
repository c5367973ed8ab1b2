"""The function of every stage, by the name of its command."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_pipeline.stages.result import StageResult

FUNCTIONS = {
    "sft": "stages.sft.run_sft",
    "train-rm": "stages.reward.run_reward",
    "ppo": "stages.ppo.run_ppo",
    "dpo": "stages.dpo.run_dpo",
    "collect": "labelling.people.collect",
}


def stage_function(stage: str) -> Callable[..., StageResult]:
    """The function that runs a stage, by its command name; only the module of this stage is imported."""
    module, _, function = FUNCTIONS[stage].rpartition(".")
    return getattr(import_module(f"rlhf_pipeline.{module}"), function)
