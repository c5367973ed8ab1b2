"""All responses that a vocabulary, a stop token and a length limit allow, as the leaves of a tree.

A node is a prefix of words (any token except the stop token). A leaf is a response: a prefix followed by the stop
token, or `horizon` words, cut there. Leaves are numbered by depth: first the ended responses with 0, 1, ...
horizon - 1 words, then the cut responses; within a depth in the order of their words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.data.batch import Layout, PackedBatch
from rlhf_pipeline.errors import MismatchError

MAX_LEAVES = 5_000_000


@dataclass(frozen=True)
class ResponseTree:
    """The tree of all responses of at most `horizon` tokens over `vocabulary` token ids; `stop_id` ends a response.

    Raises:
        MismatchError: it has more than 5 million leaves.
    """

    vocabulary: int
    stop_id: int
    horizon: int

    def __post_init__(self) -> None:
        if self.num_leaves > MAX_LEAVES:
            raise MismatchError(
                f"{self.num_leaves:,} responses of at most {self.horizon} tokens over {self.vocabulary} token ids; at "
                f"most {MAX_LEAVES:,} can be enumerated: shorten response_length or use sampled figures"
            )

    @property
    def num_words(self) -> int:
        return self.vocabulary - 1

    @property
    def num_ended(self) -> int:
        """Leaves that end in the stop token; they come first."""
        return sum(self.num_words**depth for depth in range(self.horizon))

    @property
    def num_leaves(self) -> int:
        return self.num_ended + self.num_words**self.horizon

    @cached_property
    def words(self) -> Tensor:
        """(W,) the token ids that are not the stop token."""
        ids = torch.arange(self.vocabulary)
        return ids[ids != self.stop_id]

    def prefixes(self, depth: int) -> Tensor:
        """(W^depth, depth) token ids of the nodes of one depth, in the order of their words."""
        if depth == 0:
            return torch.zeros(1, 0, dtype=torch.long)
        return torch.cartesian_prod(*[self.words] * depth).view(-1, depth)

    @cached_property
    def word_counts(self) -> np.ndarray:
        """(L,) words of each leaf, without the stop token."""
        counts = [np.full(self.num_words**depth, depth) for depth in range(self.horizon)]
        return np.concatenate([*counts, np.full(self.num_words**self.horizon, self.horizon)])

    @cached_property
    def ended(self) -> np.ndarray:
        """(L,) bool: whether a leaf ends in the stop token."""
        return np.arange(self.num_leaves) < self.num_ended

    @cached_property
    def responses(self) -> np.ndarray:
        """(L, horizon) token ids of each leaf, stop token included, padded with 0."""
        table = np.zeros((self.num_leaves, self.horizon), dtype=np.int32)
        start = 0
        for depth in range(self.horizon + 1):
            words = self.prefixes(depth).numpy()
            table[start : start + len(words), :depth] = words
            if depth < self.horizon:
                table[start : start + len(words), depth] = self.stop_id
            start += len(words)
        return table

    def completion(self, leaf: int) -> list[int]:
        """Token ids of one leaf."""
        return self.responses[leaf, : self.word_counts[leaf] + self.ended[leaf]].tolist()


def pack_siblings(prefixes: Tensor, children: Tensor, layout: Layout = "trees") -> PackedBatch:
    """Return the packed batch of n prefixes of equal length, each followed by the same one-token completions.

    It equals the result of `pack`, computed without loops: a node of a response tree takes one row with its children.

    Args:
        prefixes: (n, P) token ids, P >= 1. children: (C,) token ids.
    """
    count, width = prefixes.shape
    fan = len(children)
    if layout == "rows":
        ids = torch.cat([prefixes.repeat_interleave(fan, 0), children.repeat(count)[:, None]], 1)
        row = torch.arange(count * fan) * (width + 1)
        before, last = row + width - 1, row + width
        positions = torch.arange(width + 1).expand_as(ids)
        branch = (positions == width) * torch.arange(1, fan + 1).repeat(count)[:, None]
    else:
        ids = torch.cat([prefixes, children.expand(count, fan)], 1)
        row = torch.arange(count) * (width + fan)
        before = (row + width - 1).repeat_interleave(fan)
        last = (row[:, None] + width + torch.arange(fan)).flatten()
        positions = torch.cat([torch.arange(width), torch.full((fan,), width)]).expand_as(ids)
        branch = torch.cat([torch.zeros(width, dtype=torch.long), torch.arange(1, fan + 1)]).expand_as(ids)
    total = count * fan
    return PackedBatch(
        input_ids=ids,
        position_ids=positions.contiguous(),
        tree=torch.zeros_like(ids),
        branch=branch.contiguous(),
        predict_index=before,
        token_index=last,
        target_ids=children.repeat(count),
        completion_index=torch.arange(total),
        offset=torch.zeros(total, dtype=torch.long),
        lengths=torch.ones(total, dtype=torch.long),
        last_index=last,
        layout="rows" if layout == "rows" else "trees",
        active_tokens=ids.numel(),
        context_tokens=int((positions + 1).sum()),
        num_prompts=total if layout == "rows" else count,
    )
