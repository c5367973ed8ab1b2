"""Parents of a registered model by their role, and the beta that it was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf_pipeline.config.collect import SamplingConfig
from rlhf_pipeline.config.losses import is_reference_free
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry


def parents_of(registry: Registry, config: TrainingConfig | SamplingConfig) -> dict[str, Resolved]:
    """Return the models that a stage with this config comes from, by their role in the manifest.

    Raises:
        UnknownReference, DamagedFile: one is not there, or cannot be read.
    """
    return {
        role: registry.resolve(named.reference, revision=named.revision) for role, named in config.parents().items()
    }


def parent_of(registry: Registry, resolved: Resolved, role: str) -> Resolved | None:
    """Return the parent with a role in a model's manifest; None without one.

    Raises:
        MismatchError: the model of the parent's name has another digest, or a folder's manifest names a hub model.
        UnknownReference: the parent does not exist.
    """
    parent = resolved.manifest.parents.get(role) if resolved.manifest is not None else None
    if parent is None:
        return None
    found = registry.resolve(parent.ref)
    if resolved.kind == "directory" and found.kind == "hub":
        raise MismatchError(
            f"{resolved.label}: its manifest.json names {found.label} on the hub as its {role.replace('_', ' ')}; "
            "models named by a folder's manifest are not downloaded: name it yourself (--reference, --reward-model)"
        )
    if parent.digest is not None and found.digest != parent.digest:
        raise MismatchError(
            f"{resolved.label}: its {role.replace('_', ' ')} was {parent.ref} with the digest {parent.digest[:12]}; "
            f"here {found.label} has {str(found.digest)[:12]}: use the home in which it was trained, or name one "
            "(--reference, --reward-model)"
        )
    return found


def reference_of(registry: Registry, resolved: Resolved) -> Resolved | None:
    """Return the reference of a policy: its manifest's, else its nearest SFT ancestor, else None.

    Raises:
        MismatchError, UnknownReference: as for `parent_of`.
    """
    manifest = resolved.manifest
    if manifest is None:
        return None
    if "reference" in manifest.parents:
        return parent_of(registry, resolved, "reference")
    if manifest.stage == "sft":
        return resolved.policy
    base = parent_of(registry, resolved, "base")
    return reference_of(registry, base) if base is not None else None


def reward_models_of(registry: Registry, resolved: Resolved) -> Iterator[Resolved]:
    """Yield the reward models that a policy was trained on.

    Raises:
        MismatchError, UnknownReference: as for `parent_of`.
    """
    for role in resolved.manifest.parents if resolved.manifest is not None else ():
        if role.startswith("reward_model") and (found := parent_of(registry, resolved, role)) is not None:
            yield found


def reward_model_keys(registry: Registry, models: Sequence[Resolved]) -> dict[str, str]:
    """Return the keys of a config that name the first reward model that one of these policies was trained on.

    These are `reward_model`, its label, and `reward_tokenization`, how it read the responses; {} without one.

    Raises:
        MismatchError, UnknownReference: as for `parent_of`.
    """
    for resolved in models:
        parent = parent_of(registry, resolved, "reward_model")
        if parent is not None:
            how = resolved.config.get("reward_tokenization", "auto")
            return {"reward_model": parent.label, "reward_tokenization": how}
    return {}


def algorithm_of(resolved: Resolved) -> str | None:
    """Return the algorithm of `rlhf ppo` that trained a model; None for a model of another stage."""
    manifest = resolved.manifest
    return None if manifest is None or manifest.stage != "ppo" else manifest.config.get("algorithm") or "ppo"


def beta_of(resolved: Resolved) -> float | None:
    """Return the beta (`kl_coef`) of a model; None if unknown, 0 (no optimum) or no price of KL (no reference).

    With `kl_target` it is the kl_coef of the last rollout, where the adaptive penalty ended; that of a snapshot is not
    known. An arm with demonstrations in its context has none: it is another policy than the one that was trained.
    """
    if resolved.method is not None or resolved.manifest is None:
        return None
    config = resolved.manifest.config
    if is_reference_free(config.get("loss_type")):
        return None
    if config.get("kl_target") is not None:
        last = resolved.manifest.metrics.get("train")
        ended = last.get("objective/kl_coef") if isinstance(last, dict) and resolved.step is None else None
        return float(ended) or None if isinstance(ended, int | float) else None
    return config.get("kl_coef", config.get("beta")) or None


def rescaled_beta(resolved: Resolved) -> float | None:
    """PPO's beta in units of its reward source's own scores, where it scaled them.

    None where it did not, and for a snapshot of a run that normalised its scores: that of its step is not known.
    """
    manifest = resolved.manifest
    if manifest is None or (resolved.step is not None and manifest.config.get("normalize_rewards")):
        return None
    return (manifest.metrics.get("train") or {}).get("objective/effective_kl_coef")
