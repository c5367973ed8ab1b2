"""Lengths of prompt and response that a config inherits from its parent model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from rlhf_pipeline.config.collect import SamplingConfig
from rlhf_pipeline.config.lengths import LENGTHS, describe_lengths
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.registry.adapters import described_by
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import read_json
from rlhf_pipeline.registry.store import Registry

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
"""Keys of transformers configs for the number of positions."""

Config = TypeVar("Config", bound=TrainingConfig | SamplingConfig)


def with_lengths(config: Config, registry: Registry) -> tuple[Config, str | None]:
    """Return the config with its parent's lengths if it has none, and a line for the log.

    The digest of the returned config identifies a run and its model; the config is not changed later.

    Raises:
        UnknownReference, DamagedFile: the parent cannot be found or read.
    """
    start = next(iter(config.parents().values()), None)
    if start is None or any(getattr(config, name) is not None for name in LENGTHS):
        return config, None
    parent = registry.resolve(start.reference, revision=start.revision)
    trained = {name: parent.config[name] for name in LENGTHS if parent.config.get(name) is not None}
    if not trained:
        return config, None
    filled = cast(Config, config.model_copy(update=trained))
    lengths = filled.lengths()
    told = f"prompt {lengths.prompt}, response {lengths.response}"
    if lengths.prompt + lengths.response > lengths.total:
        told = f"prompt and response together {lengths.total}"
    return filled, f"lengths from {parent.label}: {told}"


def require_positions(config: TrainingConfig | SamplingConfig, parent: Resolved) -> None:
    """Check that the parent has enough positions for prompt and response.

    Raises:
        ConfigError: it has too few.
        DamagedFile: its config.json cannot be read.
    """
    positions, limit = limit_of(parent)
    if positions is not None and config.lengths().total > positions:
        named, told = describe_lengths(config)
        raise ConfigError(
            Fault(
                named,
                f"prompt and response of up to {config.lengths().total} tokens ({told})",
                f"at most {positions}, {limit} {parent.label}",
                "set max_prompt_length and response_length, or max_length",
            )
        )


def positions_of(resolved: Resolved) -> int | None:
    """Return the number of positions of a model, if its config tells.

    Raises:
        DamagedFile: the file cannot be read.
    """
    return limit_of(resolved)[0]


def limit_of(resolved: Resolved) -> tuple[int | None, str]:
    """`positions_in` of a model's config.json; keys that the file lacks have the architecture's defaults.

    Raises:
        DamagedFile: the file cannot be read.
    """
    resolved = described_by(resolved)
    found = positions_in({} if resolved.path is None else read_json(resolved.path / "config.json"))
    if found[0] is not None or resolved.kind == "data":
        return found
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolved.location, revision=resolved.revision)
    except Exception:  # custom code, no config, an architecture's own error: loading the model will report it
        return found
    return positions_in(config.to_dict())


def positions_in(config: Mapping[str, Any]) -> tuple[int | None, str]:
    """Return the number of positions that a transformers config (as JSON) allows, and words for them in a message.

    With longrope, the angles of all positions change when the longest sequence of a batch exceeds the original length,
    so log-probabilities would depend on what else is in the batch.
    """
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, Mapping) else [])]
    known = (part[key] for part in parts for key in POSITIONS if isinstance(part.get(key), int))
    positions = next(known, None)
    for part in parts:
        for rope in _ropes(part.get("rope_parameters") or part.get("rope_scaling")):
            original = rope.get("original_max_position_embeddings", part.get("original_max_position_embeddings"))
            longrope = rope.get("rope_type", rope.get("type")) in ("longrope", "su")
            if longrope and isinstance(original, int) and original < (positions or original + 1):
                return original, "the original positions (beyond them, longrope makes results depend on the batch) of"
    return positions, "the positions of"


def _ropes(values: object) -> list[Mapping[str, Any]]:
    """The settings of rotary embeddings: of the model, or of each type of its layers."""
    if not isinstance(values, Mapping):
        return []
    parts = [value for value in values.values() if isinstance(value, Mapping)]
    return parts or [values]
