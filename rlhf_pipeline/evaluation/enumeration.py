"""All responses that a vocabulary, a stop token and a length limit allow, as the leaves of a tree.

A node is a prefix of words (any token except the stop token). A leaf is a response: a prefix followed by the stop
token, or `horizon` words, cut there. Leaves are numbered by depth: first the ended responses with 0, 1, ...
horizon - 1 words, then the cut responses; within a depth in the order of their words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.data.batch import Layout, PackedBatch, pack
from rlhf_pipeline.data.tokenize import Example
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

    It equals the result of `pack`, which is computed for the first prefix and shifted for the others.

    Args:
        prefixes: (n, P) token ids, P >= 1. children: (C,) token ids.
    """
    count, width = prefixes.shape
    example = Example(prefixes[0].tolist(), [[child] for child in children.tolist()], [], prompt_key="", where="")
    one = pack([example], layout="rows" if layout == "rows" else "trees")
    first = one.input_ids.numel() * torch.arange(count)[:, None]  # flat position of each prefix's first row
    ids = one.input_ids.repeat(count, 1)
    ids[:, :width] = prefixes.repeat_interleave(len(one.input_ids), 0)
    return replace(
        one,
        input_ids=ids,
        position_ids=one.position_ids.repeat(count, 1),
        tree=one.tree.repeat(count, 1),
        branch=one.branch.repeat(count, 1),
        predict_index=(first + one.predict_index).flatten(),
        token_index=(first + one.token_index).flatten(),
        target_ids=children.repeat(count),
        completion_index=torch.arange(count * len(children)),
        offset=one.offset.repeat(count),
        lengths=one.lengths.repeat(count),
        last_index=(first + one.last_index).flatten(),
        active_tokens=ids.numel(),
        context_tokens=count * one.context_tokens,
        num_prompts=count * one.num_prompts,
    )
