"""Evaluate a model on every response to a prompt: log-probabilities, or scores.

A policy's probability of a response is a product of next-token distributions at its prefixes, so only the inner nodes
of the tree need a forward pass; a reward model is read once per leaf. Nodes are read a family at a time: one row of
a packed batch holds a prefix and all its children, so each prefix is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import Layout, PackedBatch
from rlhf_pipeline.evaluation.enumeration import ResponseTree, pack_siblings
from rlhf_pipeline.models.forward import hidden_states, next_token_logprobs, trunk_of
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import Policy, RewardModel


@dataclass(frozen=True)
class Reading:
    """How a tree is read. rows_at_once: prefixes, each with all its next tokens, that are read in one pass; memory:
    remembers how often their number was halved."""

    rows_at_once: int = 256
    memory: Memory = field(default_factory=Memory)
    device: torch.device | str = "cpu"


def _by_family(
    read: Callable[[PackedBatch], Tensor],
    prompt_ids: Sequence[int],
    tree: ResponseTree,
    depth: int,
    children: Tensor,
    layout: Layout,
    reading: Reading,
) -> Tensor:
    """Apply `read` to the nodes of one depth with the given children, family by family, in order.

    A family takes one row, or one row for each child in the layout "rows". If memory runs out, the number of rows is
    halved from then on.
    """
    prompt, nodes = torch.tensor(list(prompt_ids), dtype=torch.long), tree.prefixes(depth)
    families = reading.rows_at_once // len(children) if layout == "rows" else reading.rows_at_once
    most, found = min(max(1, families), len(nodes)), []

    def some(size: int) -> tuple[int, Tensor]:
        part = nodes[:size]
        prefixes = torch.cat([prompt.expand(len(part), -1), part], 1)
        return len(part), read(pack_siblings(prefixes, children, layout).to(reading.device))

    while len(nodes):
        count, values = reading.memory.shrink("exact figures", most, some, "prefix")
        found.append(values)
        nodes = nodes[count:]
    return torch.cat(found)


@torch.no_grad()
def leaf_logprobs(policy: Policy, prompt_ids: Sequence[int], tree: ResponseTree, **reading: Any) -> Tensor:
    """log pi(y | x) of every leaf y: (L,) float64 on the CPU.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t), summed in float64; exp of it sums to 1 over the leaves up to the
    rounding of the model's own number type.

    Args:
        reading: the fields of `Reading`.
    """
    how, layout = Reading(**reading), policy.reader.layout
    root = pack_siblings(torch.tensor([list(prompt_ids)]), tree.words[:1], layout).to(how.device)
    steps = [_distributions(policy, root, root.predict_index)]

    def below(batch: PackedBatch) -> Tensor:
        return _distributions(policy, batch, batch.last_index)

    for depth in range(1, tree.horizon):  # the nodes of one depth are the children of the nodes above
        steps.append(_by_family(below, prompt_ids, tree, depth - 1, tree.words, layout, how))

    ended, here = [], torch.zeros(1, dtype=torch.float64)
    for step in steps:
        ended.append(here + step[:, tree.stop_id])
        here = (here[:, None] + step[:, tree.words]).flatten()
    return torch.cat([*ended, here])


def _distributions(policy: Policy, batch: PackedBatch, index: Tensor) -> Tensor:
    """(K, V) next-token log-probabilities at flat positions, float64 on the CPU."""
    return next_token_logprobs(policy.model, policy.reader, batch, index, policy.temperature).double().cpu()


def walk_counts(prompt_length: int, tree: ResponseTree) -> tuple[int, int, int]:
    """(positions, sum of their contexts, positions with an output head) of `leaf_logprobs`, for a cost meter."""
    fan = tree.num_words
    widths = [(1, prompt_length, 1)] + [
        (tree.num_words ** (depth - 1), prompt_length + depth - 1, fan) for depth in range(1, tree.horizon)
    ]
    tokens = sum(rows * (width + children) for rows, width, children in widths)
    context = sum(rows * (width * (width + 1) // 2 + children * (width + 1)) for rows, width, children in widths)
    return tokens, context, sum(rows * children for rows, _, children in widths)


@torch.no_grad()
def leaf_scores(model: RewardModel, prompt_ids: Sequence[int], tree: ResponseTree, **reading: Any) -> Tensor:
    """r(x, y) of every leaf y: (L,) fp32 on the CPU, with the model's own `score_pooling`.

    Args:
        reading: the fields of `Reading`.
    """
    how = Reading(**reading)

    def scores(depth: int, children: Tensor) -> Tensor:
        """(W^depth, C) scores of the responses that end in a child of a node of one depth."""

        def read(batch: PackedBatch) -> Tensor:
            return _child_scores(model, batch, depth).view(-1, len(children)).cpu()

        return _by_family(read, prompt_ids, tree, depth, children, model.reader.layout, how)

    stop = torch.tensor([tree.stop_id])
    ended = [scores(depth, stop).flatten() for depth in range(tree.horizon - 1)]
    deepest = scores(tree.horizon - 1, torch.arange(tree.vocabulary))
    return torch.cat([*ended, deepest[:, tree.stop_id], deepest[:, tree.words].flatten()])


def _child_scores(model: RewardModel, batch: PackedBatch, depth: int) -> Tensor:
    """Scores of the responses of a batch, each a prefix of `depth` tokens and one token more."""
    hidden = hidden_states(trunk_of(model.model), batch)
    mean = model.pooling == "mean"
    picked = hidden.index_select(0, batch.last_index if mean else model.last_index(batch))
    if mean:
        for back in range(depth):
            picked = picked + hidden.index_select(0, batch.predict_index - back)
        picked = picked / (depth + 1)
    return model.read(picked).float()
