"""From the reward sources that a config names to objects that score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlhf_pipeline.data import world
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.models.roles import RewardModel
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.reward_names import WORLD_NAMES, is_function_name, load_function
from rlhf_pipeline.rollout.rewards import FunctionReward, ModelReward, RewardSource, WeightedReward, WorldReward
from rlhf_pipeline.stages.common import find_model, load_reward_model, require_same_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedReward:
    """A reward source, and the registered model behind it if there is one."""

    source: RewardSource
    resolved: Resolved | None = None
    model: RewardModel | None = None


@dataclass(frozen=True)
class LoadedModel(LoadedReward):
    """A reward model as a source."""

    resolved: Resolved
    model: RewardModel


def load_reward(
    registry: Registry,
    text: str,
    config: Any,
    policy: Resolved,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> LoadedReward:
    """Load one source: "world", module:function, or a reference to a reward model.

    Raises:
        MismatchError: the world asked to judge a policy with another vocabulary, a policy passed as a reward model,
            or a reward model with another tokenizer.
    """
    if text in WORLD_NAMES:
        if not world.is_world_tokenizer(tokenizer):
            raise MismatchError(
                f"reward 'world': found the tokenizer of {policy.label} with {len(tokenizer)} tokens, expected that of "
                f"{world.NAME}; the world's true reward can judge its own words only"
            )
        return LoadedReward(WorldReward())
    if is_function_name(text):
        return LoadedReward(FunctionReward(text, load_function(text), tokenizer))
    resolved = find_model(registry, text, "reward_model")
    require_same_tokenizer(policy, resolved, tokenizer, config.trust_remote_code)
    model = load_reward_model(resolved, config, device)
    return LoadedModel(ModelReward(resolved.label, model, tokenizer.pad_token_id, device), resolved, model)


def weighted(parts: Sequence[tuple[float, LoadedReward]]) -> WeightedReward:
    """The sum of weighted sources."""
    return WeightedReward(tuple((weight, loaded.source) for weight, loaded in parts))
