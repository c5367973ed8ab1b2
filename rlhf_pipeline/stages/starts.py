"""What a stage starts to train: whole weights or an adapter, beside the frozen reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.models.adapted import load_adapted
from rlhf_pipeline.models.adapters import add_adapter, on_same_weights
from rlhf_pipeline.models.loading import init_reward_model
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.noise import require_no_noise
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.stages.common import (
    frozen_policy,
    load_language_model,
    load_policy,
    loading_options,
    onto,
    policy_to_train,
    training_options,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_policy_and_reference(
    parent: Resolved,
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    reference: Resolved | None = None,
    temperature: float = 1.0,
) -> tuple[Policy, Policy]:
    """Load the policy to train and its frozen reference; by default that is the parent.

    With `use_peft` the parent is read without the new adapter, over the same weights. Otherwise the two models are
    loaded separately, so that they share no weights.
    """
    if not config.use_peft or (reference is not None and reference.label != parent.label):
        read: dict[str, Any] = {"temperature": temperature}
        policy = load_policy(parent, config, tokenizer, device, **read)
        read |= {"frozen": True} | ({} if config.use_peft else {"merged": True})
        return policy, load_policy(reference or parent, config, tokenizer, device, **read)
    model = onto(device, load_language_model(parent, config, tokenizer, **training_options(config)))
    require_no_noise(model)
    below = on_same_weights(model)
    return policy_to_train(model, config, parent.label, temperature), frozen_policy(below, temperature)


def new_reward_model(parent: Resolved, config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A reward model to train: the trunk of a language model, or with `use_peft` an adapter on it, and a new head."""
    how: dict[str, Any] = {"seed": config.seed, "score_pooling": config.score_pooling, **training_options(config)}
    model = load_adapted(init_reward_model, parent, tokenizer=tokenizer, **loading_options(config), **how)
    if config.use_peft:
        add_adapter(model, config, parent.label)
    return model
