"""Fairness: the facts that have to be equal between arms, so that only the way of training differs.

A difference in one of these facts would be measured as a difference between PPO and DPO.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from rlhf_pipeline.compare.aim import moved_options
from rlhf_pipeline.config.base import spelled
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.lengths import resolve_lengths
from rlhf_pipeline.config.losses import is_reference_free
from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.data.tokenizers import stop_ids
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.measure.trained_on import training_temperature
from rlhf_pipeline.registry.adapters import four_bits_of
from rlhf_pipeline.registry.manifest import Manifest
from rlhf_pipeline.registry.parents import reward_models_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.results import Difference
from rlhf_pipeline.stages.common import tokenizer_of

NONE = "none"
MOVED = "options that move the optimum"
ALLOWED = {
    "allow_other_data": ("preference data", "prompts"),
    "allow_other_optimum": (MOVED, "reference"),
}
"""The facts that may differ with an option of a comparison."""


def _short(digest: str | None) -> str:
    return (digest or "unknown")[:12]


def _data_of(manifest: Manifest) -> set[str]:
    """Source, split and digest of each source of a model's data, and the total number of pairs."""
    pairs = manifest.metrics.get("train_pairs", "unknown")
    return {f"{e.source} [{e.split}] {_short(e.digest)}, {pairs} pairs" for e in manifest.data}


def _preferences_of(registry: Registry, resolved: Resolved, manifest: Manifest) -> str:
    """The preference data of a policy: DPO's own, or those of PPO's reward models, and any other rewards."""
    if manifest.stage == "dpo":
        return " + ".join(sorted(_data_of(manifest))) or NONE
    found: set[str] = set()
    for model in reward_models_of(registry, resolved):
        found |= _data_of(model.manifest) if model.manifest is not None else {f"those of {model.label}"}
    others = [str(part["source"]) for part in manifest.config.get("reward_functions") or ()]
    found |= {f"the reward {source}" for source in others if not names_a_model(source)}
    return " + ".join(sorted(found)) or NONE


def _lengths_of(config: Mapping[str, int | None]) -> str:
    """The length policy, in one form for all ways to configure it."""
    named = [config.get(key) for key in ("max_prompt_length", "response_length", "max_length")]
    lengths = resolve_lengths(*named, samples=True)
    return f"prompt {lengths.prompt}, response {lengths.response}"


def stop_tokens_of(resolved: Resolved) -> str:
    """Names of the tokens that end a response."""
    tokenizer = tokenizer_of(resolved)
    return " or ".join(sorted(map(str, tokenizer.convert_ids_to_tokens(list(stop_ids(tokenizer))))))


def _reference_of(manifest: Manifest) -> str:
    """The reference of a policy's loss by name and digest."""
    if is_reference_free(manifest.config.get("loss_type")):
        return NONE
    reference = manifest.parents.get("reference")
    return f"{reference.ref} {_short(reference.digest)}" if reference else "unknown"


def facts_of(registry: Registry, resolved: Resolved) -> dict[str, str]:
    """Facts that have to be equal between arms, as text; empty for a model without a manifest.

    A fact that a stage does not have is left out (an SFT model has no preference data).
    """
    manifest = resolved.manifest
    if manifest is None:
        return {}
    config = manifest.config
    bf16 = manifest.metrics.get("bf16", config.get("bf16"))  # the metric holds the value that `auto` resolved to
    facts = {
        "tokenizer": _short(manifest.tokenizer_digest),
        "chat template": _short(manifest.chat_template_digest) if manifest.chat_template_digest else NONE,
        "lengths": _lengths_of(config),
        "stop token": stop_tokens_of(resolved),
        "dtype": f"{config.get('dtype')}{' with bf16 autocast' if bf16 else ''}",
    }
    if manifest.stage not in ("ppo", "dpo"):
        return facts
    base = manifest.parents.get("base")
    moved = moved_options(registry, resolved)
    return facts | {
        "SFT parent": f"{base.ref} {_short(base.digest)}" if base else "unknown",
        "reference": _reference_of(manifest),
        "preference data": _preferences_of(registry, resolved, manifest),
        "labels": "their probabilities" if config.get("soft_labels") else "as drawn",
        "prompts": " + ".join(sorted(_short(entry.digest) for entry in manifest.data if not entry.is_stream)) or NONE,
        "frozen weights": "as stored" if (held := four_bits_of(resolved)) is None else held.keys,
        "training temperature": f"{training_temperature(resolved):g}",
        MOVED: ", ".join(f"{k}={spelled(v)}" for k, v in sorted(moved.items())) or NONE,
    }


def differences(registry: Registry, arms: Mapping[str, Sequence[Resolved]]) -> list[Difference]:
    """The facts in which arms differ; models and data are compared by digest, so names do not matter."""
    facts = {arm: [facts_of(registry, model) for model in models] for arm, models in arms.items()}
    names = list(dict.fromkeys(name for rows in facts.values() for row in rows for name in row))
    found = []
    for name in names:
        values = {
            arm: {_identity(name, row[name]): row[name] for row in rows if name in row} for arm, rows in facts.items()
        }
        known = {arm: entries for arm, entries in values.items() if entries}
        if len({tuple(sorted(entries)) for entries in known.values()}) > 1:
            told = {arm: " or ".join(sorted(entries.values())) for arm, entries in known.items()}
            found.append(Difference(what=name, values=told))
    return found


def differences_by_seed(registry: Registry, points: Sequence[tuple[str, int | None, Resolved]]) -> list[Difference]:
    """`differences` over all points and for each seed, since arms are paired by seed.

    Args:
        points: (arm, seed, model) of each.
    """
    groups = [
        points,
        *([p for p in points if p[1] == seed] for seed in sorted({p[1] for p in points if p[1] is not None})),
    ]
    found: dict[str, Difference] = {}
    for group in groups:
        arms: dict[str, list[Resolved]] = {}
        for arm, _, model in group:
            arms.setdefault(arm, []).append(model)
        for difference in differences(registry, arms):
            found.setdefault(difference.what, difference)
    return list(found.values())


def _trained_on(registry: Registry, resolved: Resolved) -> set[str]:
    """Digests of a policy's training data; for PPO, of the data of its reward models."""
    if resolved.manifest is None:
        return set()
    behind = [resolved]
    if resolved.manifest.stage == "ppo":
        behind = list(reward_models_of(registry, resolved))
    return {entry.digest for one in behind if one.manifest is not None for entry in one.manifest.data}


def judge_overlap(registry: Registry, judge: Resolved | None, models: Sequence[Resolved]) -> list[Difference]:
    """Report a judge that is a reward model of an arm, or that was trained on pairs that an arm was trained on."""
    if judge is None or judge.manifest is None:
        return []
    seen = {entry.digest for entry in judge.manifest.data}
    saw = [model.label for model in models if seen & _trained_on(registry, model)]
    values = dict.fromkeys(saw, f"pairs that {judge.label} was also trained on")
    return [Difference(what="judge: not held out", values=values)] if values else []


def truth_overlap(registry: Registry, truth: Resolved | None, models: Sequence[Resolved]) -> list[Difference]:
    """Report a true-reward model that is also the reward model of an arm."""
    if truth is None:
        return []
    own = [one.label for one in models if truth.digest in {reward.digest for reward in reward_models_of(registry, one)}]
    values = dict.fromkeys(own, f"{truth.label} as its own reward model")
    return [Difference(what="true_reward: a reward that an arm is trained on", values=values)] if values else []


def _identity(name: str, value: str) -> str:
    """The part of a value that is compared: the digest of models and data, not the name; the values of options that
    move the optimum, not the stage (weight decay of a PPO reward model equals the same weight decay of DPO)."""
    if name == MOVED:
        return ", ".join(sorted(set(re.sub(r"\breward_model(_\d+)?\.", "", value).split(", "))))
    if name not in ("SFT parent", "reference", "preference data"):
        return value
    parts = (
        part.rpartition("] ")[2] if name == "preference data" else part.rpartition(" ")[2]
        for part in value.split(" + ")
    )
    return " + ".join(sorted(set(parts)))


def unexpected(found: Sequence[Difference], allowed: Collection[str]) -> list[Difference]:
    """The differences that make a comparison unfair: those that no option in `allowed` makes a part of it."""
    permitted = {fact for option in allowed for fact in ALLOWED[option]}
    return [one for one in found if one.what not in permitted]


def allowed_by(config: CompareConfig) -> list[str]:
    """The options of a comparison that permit differences, by name."""
    return [option for option in ALLOWED if getattr(config, option)]


def require_comparable(found: Sequence[Difference]) -> None:
    """Refuse arms that differ in more than the way they were trained.

    Raises:
        MismatchError: naming every difference.
    """
    if found:
        listed = "\n".join(f"  {difference}" for difference in found)
        raise MismatchError(
            f"these arms differ in more than the way they were trained:\n{listed}\ntrain them "
            f"under the same conditions, or compare them anyway with {_flags(found)}: the report then says so"
        )


def _flags(found: Sequence[Difference]) -> str:
    """The options that permit these differences, the narrowest that do."""
    needed = [option for option, facts in ALLOWED.items() if any(one.what in facts for one in found)]
    needed = ["allow_mismatch"] if unexpected(found, needed) else needed
    return " ".join(f"--{option.replace('_', '-')}" for option in needed)
