"""Lengths of prompt and response that a config inherits from its parent model."""

from __future__ import annotations

from typing import TypeVar, cast

from rlhf_pipeline.config.base import LENGTHS, lengths_told
from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import read_json
from rlhf_pipeline.registry.store import Registry

Config = TypeVar("Config", bound=TrainingConfig | CollectConfig)


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
    told = f"lengths from {parent.label}: prompt {lengths.prompt}, response {lengths.response}"
    return filled, told


def require_positions(config: TrainingConfig | CollectConfig, parent: Resolved) -> None:
    """Check that the parent has enough positions for prompt and response.

    Raises:
        ConfigError: it has too few.
        DamagedFile: its config.json cannot be read.
    """
    positions = positions_of(parent)
    if positions is not None and config.lengths().total > positions:
        named, told = lengths_told(config)
        raise ConfigError(
            Fault(
                named,
                f"prompt and response of up to {config.lengths().total} tokens ({told})",
                f"at most {positions}, the positions of {parent.label}",
                "set max_prompt_length and response_length, or max_length",
            )
        )


def positions_of(resolved: Resolved) -> int | None:
    """Return the number of positions of a model, if a local config.json has it.

    Raises:
        DamagedFile: the file cannot be read.
    """
    values = {} if resolved.path is None else read_json(resolved.path / "config.json")
    return next(
        (values[key] for key in ("max_position_embeddings", "n_positions") if isinstance(values.get(key), int)), None
    )
