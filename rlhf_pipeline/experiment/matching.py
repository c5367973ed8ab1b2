"""Whether arms can be compared: what they have in common but the way they were trained.

A difference in any of these facts would be measured as if it were a difference between PPO and DPO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry

NONE = "none"


@dataclass(frozen=True)
class Difference:
    """One fact in which arms differ, and what it is for each of them."""

    what: str
    values: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "values": dict(self.values)}

    def __str__(self) -> str:
        return f"{self.what}: " + ", ".join(f"{arm} has {value}" for arm, value in self.values.items())


def _short(digest: str | None) -> str:
    return (digest or "unknown")[:12]


def _data_of(resolved: Resolved) -> str:
    entries = [f"{entry.source} [{entry.split}] {_short(entry.digest)}" for entry in resolved.manifest.data]
    return " + ".join(sorted(entries)) or NONE


def _preferences_of(registry: Registry, resolved: Resolved) -> str:
    """The preference data behind a policy: DPO's own, or those of PPO's reward models."""
    if resolved.manifest.stage == "dpo":
        return _data_of(resolved)
    found = []
    for role, parent in sorted(resolved.manifest.parents.items()):
        if role.startswith("reward_model"):
            model = registry.resolve(parent.ref)
            found.append(_data_of(model) if model.manifest is not None else f"those of {parent.ref}")
    return " + ".join(found) or f"{NONE} (reward: {_reward_names(resolved)})"


def _reward_names(resolved: Resolved) -> str:
    return ", ".join(str(part["source"]) for part in resolved.manifest.config.get("reward_functions") or []) or NONE


def _prompts_of(resolved: Resolved) -> str:
    """The set of prompts that a policy was trained on, by the digest of the records that they came from."""
    return " + ".join(sorted(_short(entry.digest) for entry in resolved.manifest.data)) or NONE


def facts_of(registry: Registry, resolved: Resolved) -> dict[str, str]:
    """What has to be equal between arms, as text; empty for a model without a manifest.

    A stage that has no such thing (an SFT model has no preference data) says nothing about it.
    """
    manifest = resolved.manifest
    if manifest is None:
        return {}
    config = manifest.config
    facts = {
        "tokenizer": _short(manifest.tokenizer_digest),
        "chat template": _short(manifest.chat_template_digest) if manifest.chat_template_digest else NONE,
        "lengths": f"prompt {config.get('max_prompt_length')}, response {config.get('response_length')}, "
        f"together {config.get('max_length')}",
        "stop token": config.get("stop_token") or "the tokenizer's end token",
        "dtype": f"{config.get('dtype')}{' with bf16 autocast' if config.get('bf16') else ''}",
    }
    if manifest.stage not in ("ppo", "dpo"):
        return facts
    reference, base = (manifest.parents.get(role) for role in ("reference", "base"))
    moved = manifest.metrics.get("moved_optimum") or {}
    return facts | {
        "SFT parent": f"{base.ref} {_short(base.digest)}" if base else "unknown",
        "reference": f"{reference.ref} {_short(reference.digest)}" if reference else "unknown",
        "preference data": _preferences_of(registry, resolved),
        "prompts": _prompts_of(resolved),
        "training temperature": f"{float(config.get('temperature') or 1.0):g}",
        "options that move the optimum": ", ".join(f"{k}={v}" for k, v in sorted(moved.items())) or NONE,
    }


def differences(registry: Registry, arms: Mapping[str, Sequence[Resolved]]) -> list[Difference]:
    """The facts in which arms differ, or in which the points of one arm do.

    Only the digest decides where there is one: the same SFT model under two names is the same.
    """
    facts = {arm: [facts_of(registry, model) for model in models] for arm, models in arms.items()}
    names = list(dict.fromkeys(name for rows in facts.values() for row in rows for name in row))
    found = []
    for name in names:
        values = {arm: sorted({row[name] for row in rows if name in row}) for arm, rows in facts.items()}
        known = {arm: entries for arm, entries in values.items() if entries}
        if len({tuple(_identity(name, entry) for entry in entries) for entries in known.values()}) > 1:
            found.append(Difference(name, {arm: " or ".join(entries) for arm, entries in known.items()}))
    return found


def _identity(name: str, value: str) -> str:
    """What decides whether two values are the same: of models and data their digests, not their names."""
    if name not in ("SFT parent", "reference", "preference data"):
        return value
    return " + ".join(part.rpartition(" ")[2] for part in value.split(" + "))


def require_comparable(found: Sequence[Difference]) -> None:
    """Refuse arms that differ in more than the way they were trained.

    Raises:
        MismatchError: naming every difference.
    """
    if found:
        listed = "\n".join(f"  {difference}" for difference in found)
        raise MismatchError(
            f"these arms differ in more than the way they were trained:\n{listed}\ntrain them alike, or compare them "
            "all the same with --allow-mismatch: the report then says so"
        )
