"""Adapters: folders with a small difference to another model, their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.errors import BadInput, MismatchError
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WHOLE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def is_adapter(folder: Path) -> bool:
    """Whether a model's folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(resolved: Resolved, resolve: Callable[[str], Resolved]) -> Resolved:
    """Return the model that an adapter stands on: by its manifest, else by `base_model_name_or_path`.

    Raises:
        BadInput: the folder has whole weights too, or names no base, a base on the hub, or itself.
        MismatchError: the base has other weights than the one that the adapter was trained on.
        UnknownReference: the base does not exist.
    """
    assert resolved.path is not None  # only folders are known to be adapters
    whole = sorted(found.name for pattern in _WHOLE_WEIGHTS for found in resolved.path.glob(pattern))
    if whole:
        raise BadInput(
            f"{resolved.label}: found {ADAPTER_CONFIG} beside whole weights ({whole[0]}), which may already contain "
            "the adapter; expected one of the two: move the adapter's files, or the weights, into another folder"
        )
    parent = resolved.manifest.parents.get("base") if resolved.manifest is not None else None
    named = (
        parent.ref if parent is not None else read_json(resolved.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    )
    if not isinstance(named, str) or not named:
        raise BadInput(f"{resolved.label}: {ADAPTER_CONFIG} names no base; set its base_model_name_or_path")
    base = resolve(named)
    if base.kind == "hub" and resolved.kind == "directory":
        raise BadInput(
            f"{resolved.label}: the base of this adapter is {base.label} on the hub; models named by a folder are not "
            f"downloaded: download it, and write its folder into base_model_name_or_path of {ADAPTER_CONFIG}"
        )
    if base.path == resolved.path:
        raise BadInput(f"{resolved.label}: {ADAPTER_CONFIG} names the adapter itself as its base")
    if parent is not None and parent.digest is not None and base.digest != parent.digest:
        raise MismatchError(
            f"{resolved.label}: this adapter was trained on {parent.ref} with the digest {parent.digest[:12]}; here "
            f"{base.label} has {str(base.digest)[:12]}: use the home in which it was trained"
        )
    return base


def described_by(resolved: Resolved) -> Resolved:
    """Return the model whose folder has the config of a model: itself, or the base of an adapter without its own.

    Raises:
        The errors of `base_of`.
    """
    while resolved.path is not None and not (resolved.path / "config.json").is_file() and resolved.base is not None:
        resolved = resolved.base
    return resolved


def chain_of(resolved: Resolved) -> tuple[Resolved, list[Resolved]]:
    """Return the whole model at the bottom of a model, and the adapters on it, the lowest first.

    Raises:
        BadInput: the adapters stand on each other in a circle. The errors of `base_of`.
    """
    adapters: list[Resolved] = []
    while (base := resolved.base) is not None:
        adapters.insert(0, resolved)
        if base.path in [above.path for above in adapters]:
            raise BadInput(f"{resolved.label}: found {base.label}, which stands on it, as its base")
        resolved = base
    return resolved, adapters


def four_bits_of(resolved: Resolved) -> FourBits | None:
    """How the weights below an adapter were held in 4 bits when it was trained; None: as they are stored.

    Its config.json says so by transformers' `quantization_config`; the files of the base are those before.
    """
    if resolved.path is None or not is_adapter(resolved.path):
        return None
    how = read_json(resolved.path / "config.json").get("quantization_config")
    if not isinstance(how, dict) or how.get("load_in_4bit") is not True:
        return None
    return FourBits(how.get("bnb_4bit_quant_type", "nf4"), bool(how.get("bnb_4bit_use_double_quant")))


def require_same_base(policy: Resolved, reward: Resolved, four_bits: FourBits | None = None) -> None:
    """Check that policy and reward model are, or are trained as, adapters on the same whole weights.

    four_bits: how the policy's are held.

    Raises:
        MismatchError: they are not; the message names both.
    """
    (ours, _), (theirs, adapters) = chain_of(policy), chain_of(reward)
    same = ours.digest == theirs.digest if ours.digest and theirs.digest else ours.label == theirs.label
    if adapters and same and (trained := four_bits_of(reward)) != four_bits:
        held, expected = ("load_in_4bit: false" if how is None else how.keys for how in (trained, four_bits))
        raise MismatchError(
            f"shared_base: reward model {reward.label} was trained with {held}, expected {expected}, as the policy "
            f"{policy.label} is: train both alike, or use shared_base: false"
        )
    if adapters and same:
        return
    found = f"adapters on {theirs.label}" if adapters else "whole weights"
    raise MismatchError(
        f"shared_base: reward model {reward.label}: found {found} {str(theirs.digest)[:12]}, expected adapters on "
        f"{ours.label} {str(ours.digest)[:12]}, on which the policy {policy.label} is trained; train it with "
        f"rlhf train-rm model_name_or_path={policy.label} use_peft=true, or use shared_base: false"
    )
