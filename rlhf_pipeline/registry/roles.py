"""Roles of models: policies generate, reward models score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from rlhf_pipeline.errors import DamagedFile, MismatchError
from rlhf_pipeline.registry.references import Resolved

Role = Literal["policy", "reward_model"]

_ROLE_OF_STAGE: dict[str, Role] = {
    "sft": "policy",
    "ppo": "policy",
    "dpo": "policy",
    "reward": "reward_model",
}
_ARCHITECTURES: dict[Role, tuple[str, ...]] = {
    "policy": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    "reward_model": ("ForSequenceClassification",),
}
_ROLE_OF_TASK: dict[str, Role] = {"CAUSAL_LM": "policy", "SEQ_CLS": "reward_model"}
_EXPECTED: dict[Role, str] = {
    "policy": "a policy: a model of the stage sft, ppo or dpo, or a causal language model",
    "reward_model": "a reward model: a model of the stage reward, or one for sequence classification",
}
_FIX: dict[Role, str] = {
    "policy": "name a language model here (rlhf models list shows the stages)",
    "reward_model": "name the output of rlhf train-rm here (rlhf models list shows the stages)",
}


def check_role(resolved: Resolved, role: Role) -> None:
    """Check that a model has a role, as far as this is known before loading.

    A hub model, or one whose config has no architecture, passes; loading it checks again.

    Raises:
        MismatchError: it has another role.
        DamagedFile: its config cannot be read.
    """
    found, evidence = role_of(resolved)
    if evidence and found != role:
        raise MismatchError(f"{resolved.label}: {evidence}; expected {_EXPECTED[role]}; {_FIX[role]}")


def role_of(resolved: Resolved) -> tuple[Role | None, str]:
    """Return the role of a model and the evidence for it; empty evidence if the role is unknown."""
    if resolved.stage in _ROLE_OF_STAGE:
        role = _ROLE_OF_STAGE[resolved.stage]
        kind = "policy" if role == "policy" else "reward model"
        return role, f"a {kind} of the stage {resolved.stage}"
    if resolved.kind == "data":
        return None, "collected data"
    if resolved.path is None:
        return None, ""
    task = read_json(resolved.path / "adapter_config.json").get("task_type")
    if task and isinstance(task, str):
        return _ROLE_OF_TASK.get(task), f"an adapter for the task {task}"
    architectures = read_json(resolved.path / "config.json").get("architectures") or []
    if not isinstance(architectures, list) or any(not isinstance(name, str) for name in architectures):
        raise DamagedFile(f"{resolved.path / 'config.json'}: architectures: expected a list of names; restore the file")
    for role, endings in _ARCHITECTURES.items():
        if any(name.endswith(endings) for name in architectures):
            return role, f"a model of the architecture {', '.join(architectures)}"
    return None, f"a model of the architecture {', '.join(architectures)}" if architectures else ""


def read_json(path: Path, fix: str = "restore the file") -> dict:
    """Return the object in a JSON file; {} if the file does not exist.

    Raises:
        DamagedFile: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise DamagedFile(f"{path}: not valid JSON ({error}); {fix}") from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: {type(content).__name__}, expected a JSON object; {fix}")
    return content
