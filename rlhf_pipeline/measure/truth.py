"""Whether the built-in world's reward is the truth of an evaluation: by what is asked for, else by the data."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_pipeline.config.compare import PromptsConfig
from rlhf_pipeline.config.reward_names import WORLD_NAMES
from rlhf_pipeline.data import world
from rlhf_pipeline.registry.lineage import COLLECTED
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry

REWARD_KEYS = ("true_reward", "reward_model", "judge", "reward")
"""Keys of evaluation configs that name a reward."""


def source_of(config: PromptsConfig, resolved: Resolved) -> str | None:
    """The source of an evaluation's prompts: the one asked for, else that of the model's own data, if it is known."""
    return config.prompts or resolved.config.get("dataset_name")


def labelled_by_world(
    registry: Registry, config: PromptsConfig, resolved: Resolved, say: Callable[[str], None]
) -> bool:
    """Whether a model that reads the world's words is to be judged by the world's reward; logs why, or why not.

    It is where a key of the config asks for the world, where the prompts are the world's, and where they were collected
    with the world as their judge. The tokenizer alone says nothing: a model may have been trained on other data.

    Raises:
        UnknownReference, DamagedFile: collected data that are not there, or not whole.
    """
    source = source_of(config, resolved)
    asked = [key for key in REWARD_KEYS if key in config.model_fields_set and getattr(config, key) in WORLD_NAMES]
    if asked:
        say(f"true reward: the built-in world's, since {asked[0]} asks for it")
    elif source == world.NAME:
        say(f"true reward: the built-in world's, since the prompts are those of {source}")
    elif source is not None and _judged_by_world(registry, source):
        say(f"true reward: the built-in world's, since it labelled {source}")
    else:
        say(
            f"note: {resolved.label} reads the words of {world.NAME}, but nothing says that the world labelled "
            f"{source or 'its data'}: the world's reward is not used; ask for it by true_reward: world "
            "(--true-reward world; rlhf exact: --reward world)"
        )
        return False
    return True


def _judged_by_world(registry: Registry, source: str) -> bool:
    """Whether a source is collected data that the world has judged."""
    if not source.startswith(COLLECTED):
        return False
    manifest = registry.resolve_data(source.removeprefix(COLLECTED)).manifest
    return manifest is not None and manifest.config.get("judge") in WORLD_NAMES
