"""The lengths of prompt and response that a config takes over from the model it starts from."""

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
    """Return the config with the lengths that its parent was trained with where it names none, and a line for the log.

    The digest of the returned config names a run and its model; nothing fills in the config later.

    Raises:
        UnknownReference, DamagedFile: the parent cannot be found or read.
    """
    if (named := _start_of(config)) is None or any(getattr(config, name) is not None for name in LENGTHS):
        return config, None
    parent = registry.resolve(named[0], revision=named[1])
    known = {} if parent.manifest is None else parent.manifest.config
    trained = {name: known[name] for name in LENGTHS if known.get(name) is not None}
    if not trained:
        return config, None
    filled = cast(Config, config.model_copy(update=trained))
    lengths = filled.lengths()
    told = f"lengths as {parent.label} was trained with: prompt {lengths.prompt}, response {lengths.response}"
    return filled, told


def _start_of(config: TrainingConfig | CollectConfig) -> tuple[str, str | None] | None:
    """The model that a config starts from, with its revision on the hub; None where it makes a new one."""
    if isinstance(config, CollectConfig):
        return config.policy, None
    return None if config.model_name_or_path is None else (config.model_name_or_path, config.model_revision)


def require_positions(config: TrainingConfig | CollectConfig, parent: Resolved) -> None:
    """Check that the parent has as many positions as prompt and response are long together.

    Raises:
        ConfigError: it has fewer.
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
    """Return the number of positions of a model, where a config.json on this machine names it.

    Raises:
        DamagedFile: the file cannot be read.
    """
    values = {} if resolved.path is None else read_json(resolved.path / "config.json")
    return next(
        (values[key] for key in ("max_position_embeddings", "n_positions") if isinstance(values.get(key), int)), None
    )
