"""Whether the built-in world's reward is the true reward of an evaluation."""

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
    """The source of an evaluation's prompts: that of the config, else that of the model's own data; None if unknown."""
    return config.prompts or resolved.config.get("dataset_name")


def labelled_by_world(
    registry: Registry, config: PromptsConfig, resolved: Resolved, say: Callable[[str], None]
) -> bool:
    """Whether the world's reward is the true reward of a model with the world's tokenizer; logs the reason.

    It is if a key of the config names the world, if the prompts are the world's, or if the world labelled the collected
    data. The tokenizer alone decides nothing: the model may have been trained on other data.

    Raises:
        UnknownReference, DamagedFile: collected data are missing or damaged.
    """
    source = source_of(config, resolved)
    asked = [key for key in REWARD_KEYS if key in config.model_fields_set and getattr(config, key) in WORLD_NAMES]
    if asked:
        say(f"true reward: the built-in world's, since {asked[0]} names it")
    elif source == world.NAME:
        say(f"true reward: the built-in world's, since the prompts are those of {source}")
    elif source is not None and _judged_by_world(registry, source):
        say(f"true reward: the built-in world's, since it labelled {source}")
    else:
        say(
            f"note: {resolved.label} has the tokenizer of {world.NAME}, but nothing shows that the world labelled "
            f"{source or 'its data'}: the world's reward is not used; to use it, set true_reward: world "
            "(--true-reward world; rlhf exact: --reward world)"
        )
        return False
    return True


def _judged_by_world(registry: Registry, source: str) -> bool:
    """Whether a source is collected data that the world labelled."""
    if not source.startswith(COLLECTED):
        return False
    manifest = registry.resolve_data(source.removeprefix(COLLECTED)).manifest
    return manifest is not None and manifest.config.get("judge") in WORLD_NAMES
