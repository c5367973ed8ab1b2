"""The options that move the optimum of a model or of its reward models: `moves_optimum` of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.config.base import may_move_optimum, moves_optimum, moving_options
from rlhf_pipeline.config.stages import STAGES, TrainingConfig
from rlhf_pipeline.registry.manifest import Manifest
from rlhf_pipeline.registry.references import Resolved

REWARD_MODEL = "reward_model"
_CLASSES = {"reward": STAGES["train-rm"], "ppo": STAGES["ppo"], "dpo": STAGES["dpo"]}


def own_moves(manifest: Manifest) -> dict[str, Any]:
    """Return the model's own options that move its optimum; for an older manifest, computed from its config."""
    if manifest.moves_optimum is not None:
        return {name: value for name, value in manifest.moves_optimum.items() if not name.startswith(REWARD_MODEL)}
    if manifest.stage not in _CLASSES:
        return {}
    return _of_parents(moving_options(_CLASSES[manifest.stage], manifest.config), manifest.parents)


def carried_moves(parents: Mapping[str, Resolved]) -> dict[str, Any]:
    """Return the options that moved the minimiser of a policy's reward models, as `reward_model.option`.

    A reward model without a manifest is skipped, because its options are unknown.
    """
    return {
        f"{role}.{name}": value
        for role, parent in parents.items()
        if role.startswith(REWARD_MODEL) and parent.manifest is not None
        for name, value in own_moves(parent.manifest).items()
    }


def optimum_fields(config: TrainingConfig, parents: Mapping[str, Resolved]) -> dict[str, dict[str, Any]]:
    """Return the manifest fields `moves_optimum` and `may_move_optimum` of a model with these parents."""
    own = _of_parents(moves_optimum(config), parents)
    return {"moves_optimum": own | carried_moves(parents), "may_move_optimum": may_move_optimum(config)}


def _of_parents(moved: dict[str, Any], parents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, without `ref_model` if it is the model that training started from."""
    base, reference = parents.get("base"), parents.get("reference")
    if base is not None and reference is not None and base.digest == reference.digest:
        return {name: value for name, value in moved.items() if name != "ref_model"}
    return moved
