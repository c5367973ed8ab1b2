"""Embeddings of prompts by a policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import FILLER, pack
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.models.forward import hidden_states, trunk_of
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.rollout.scoring import score


def prompt_embeddings(
    policy: Policy,
    prompts: Sequence[Example],
    *,
    responses_at_once: int,
    memory: Memory | None = None,
    device: torch.device | str,
) -> Tensor:
    """The mean over each prompt's tokens of the policy's last hidden states: (P, D) on the CPU, in float64."""

    def means(part: Sequence[Example]) -> Tensor:
        batch = pack(part, layout=policy.reader.layout).to(device)
        counts = torch.tensor([len(one.prompt_ids) for one in part], device=device)
        owner = torch.repeat_interleave(counts)  # the prompt that each position belongs to
        ends = counts.cumsum(0)
        place = torch.arange(int(ends[-1]), device=device) - (ends - counts)[owner]
        first = batch.predict_index - counts + 1  # the position that predicts a completion ends its prompt
        hidden = hidden_states(trunk_of(policy.model), batch, first[owner] + place).double()
        return hidden.new_zeros(len(part), hidden.shape[1]).index_add(0, owner, hidden) / counts[:, None]

    # A batch needs a completion behind each prompt; no prompt attends to it.
    bare = [replace(one, completions=[[FILLER]], ended=[True], trained=None, ranks=None) for one in prompts]
    return score(means, bare, responses_at_once=responses_at_once, memory=memory)
