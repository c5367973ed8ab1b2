"""Build PPO's actor-critic."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlhf_pipeline.data.batch import common_layout
from rlhf_pipeline.models.forward import Reader, trunk_of
from rlhf_pipeline.models.modules import ActorCritic, RewardModel, ValueInit, sequence_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_actor_critic(
    actor: PreTrainedModel,
    reader: Reader,
    value_init: ValueInit,
    *,
    reward_model: RewardModel | None = None,
    temperature: float = 1.0,
) -> ActorCritic:
    """Combine the actor with a critic.

    * reward_model: a separate trunk, copied from the reward model; the value head is the reward head with bias
      -reward_shift, so at the last response token it gives the reward model's score.
    * sft: a separate trunk, copied from the actor before training; the head starts at 0.
    * shared: a head on the actor's trunk; it starts at 0, so all values are 0 at step 0.
    """
    critic: PreTrainedModel | None
    if value_init == "reward_model":
        if reward_model is None:
            raise ValueError("value_init 'reward_model' needs a reward model")
        source = reward_model.model
        critic = copy.deepcopy(trunk_of(source))
        reader = replace(reader, layout=common_layout(reader.layout, reward_model.reader.layout))  # both read one batch
        weight, bias = sequence_head(source).weight.detach().clone(), -reward_model.reward_shift
    else:
        critic = copy.deepcopy(trunk_of(actor)) if value_init == "sft" else None
        parameter = next(actor.parameters())
        width = actor.get_output_embeddings().weight.shape[1]
        weight, bias = torch.zeros(1, width, dtype=parameter.dtype, device=parameter.device), 0.0
    value_head = nn.Linear(weight.shape[1], 1).to(weight.device, weight.dtype)
    with torch.no_grad():
        value_head.weight.copy_(weight)
        value_head.bias.fill_(bias)
    if critic is not None:
        critic.requires_grad_(True)
    return ActorCritic(actor, reader, critic, value_head, temperature)


def describe_critic(value_init: ValueInit, reward_model: str | None) -> str:
    """One line for the log: the kind of critic and its initialisation."""
    return {
        "reward_model": f"critic: a separate trunk, initialised from the reward model {reward_model}",
        "sft": "critic: a separate trunk, initialised from the SFT model; the value head starts at 0",
        "shared": "critic: a value head on the actor's trunk; it starts at 0",
    }[value_init]
