"""Tree attention on accelerators: torch's FlexAttention with the trees as its block mask.

This project has not yet run it on a GPU. `flex_works` therefore tests it on the machine: it is used only if forward and
backward pass agree with `tree_attention`; otherwise rows with a 4-D mask are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.attention import Tree, attention_plan, tree_attention

BLOCK = 128
"""Tokens per block of the mask, FlexAttention's default."""

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def flex_plan(trees: Sequence[Tree], *, window: int | None = None, device: torch.device | str = "cpu") -> BlockMask:
    """The block mask of consecutive trees; made once and used by every layer.

    Args:
        trees, window: see `attention_plan`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tree_of: list[int] = []
    branch_of: list[int] = []
    position_of: list[int] = []
    for index, (prompt, completions) in enumerate(trees):
        for part, (first, count) in enumerate(((0, prompt), *((prompt, count) for count in completions))):
            tree_of += [index] * count
            branch_of += [part] * count
            position_of += range(first, first + count)
    tree, branch, position = (torch.tensor(values, device=device) for values in (tree_of, branch_of, position_of))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (tree[query] == tree[key]) & (query >= key)
        seen = seen & ((branch[key] == 0) | (branch[key] == branch[query]))
        return seen if window is None else seen & (position[query] - position[key] < window)

    # The ends of two blocks decide whether one may see the other, so no length x length mask is made.
    length = len(tree_of)
    starts = torch.arange(0, length, BLOCK)
    ends = (starts + BLOCK).clamp_max(length) - 1
    trees_at = torch.tensor(tree_of)
    low, high = trees_at[starts], trees_at[ends]
    number = torch.arange(len(starts))
    visible = (number[:, None] >= number) & (low[:, None] <= high)  # trees are in order
    counts = visible.sum(-1).int()
    indices = visible.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts[None, None].to(device),
        indices[None, None].to(device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: BlockMask, *, scale: float) -> Tensor:
    """`tree_attention` by FlexAttention: (H, T, D) in the type of `value`; scores are summed in fp32."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = cast("Callable[..., Any]", flex_attention) if query.device.type == "cpu" else _compiled()
    states = (states.to(value.dtype)[None] for states in (query, key, value))
    return attend(*states, block_mask=plan, scale=scale, enable_gqa=query.shape[0] != key.shape[0])[0]


@lru_cache(maxsize=16)
def flex_works(device: str, dtype: torch.dtype, width: int, heads: tuple[int, int]) -> bool:
    """Whether FlexAttention gives the outputs and gradients of `tree_attention` on a device, to 2e-2 of the largest.

    Args:
        dtype: dtype of the states. width: size of a head. heads: number of query heads, and of key and value heads.
    """
    trees = [(150, (20, 35)), (9, (5,)), (40, (1, 2, 3))]
    length = sum(prompt + sum(completions) for prompt, completions in trees)
    draw = torch.Generator().manual_seed(0)
    query, key, value, slope = (
        torch.randn(count, length, width, generator=draw).to(device, dtype)
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    results = []
    try:
        # The caller may have disabled gradients or enabled autocast.
        with torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
            for flex in (True, False):
                q, k, v = (states.clone().requires_grad_() for states in (query, key, value))
                if flex:
                    output = flex_tree_attention(q, k, v, flex_plan(trees, device=device), scale=width**-0.5)
                else:
                    output = tree_attention(q, k, v, attention_plan(trees, device=device), scale=width**-0.5)
                results.append([output, *torch.autograd.grad(output, (q, k, v), slope)])
    except Exception:  # any error of a compiler, a driver or a version of torch: do without it
        return False
    return all(
        bool((one.float() - other.float()).abs().max() <= 2e-2 * other.float().abs().max())
        for one, other in zip(*results, strict=True)
    )
