"""Tree attention as an attention implementation of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.attention import Block, Tree, attention_plan, tree_attention
from rlhf_pipeline.algorithms.flex import flex_plan, flex_tree_attention, flex_works

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

NAME = "rlhf_trees"
REFUSED = ("softcap", "s_aux", "sinks", "position_bias")
"""Options that change an architecture's attention scores; `tree_attention` does not support them."""


class TreeMask(Tensor):
    """A replacement of the 4-D mask, which transformers passes to every layer unchanged.

    plan: the blocks for the trees of the row; on accelerators a block mask of FlexAttention.
    """

    plan: list[Block] | BlockMask
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch does

    @classmethod
    def of(cls, trees: Sequence[Tree], window: int | None, dtype: torch.dtype, device: torch.device) -> TreeMask:
        """The mask of the trees of one row.

        window: the window of sliding-window layers, in positions. dtype: the dtype of the model.
        """
        mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device).as_subclass(cls)
        longest = max(prompt + max(completions, default=0) for prompt, completions in trees)
        window = window if window is not None and window < longest else None
        if device.type == "cpu":
            kind = torch.promote_types(dtype, torch.float32)
            mask.plan = attention_plan(trees, window=window, dtype=kind, device=device)
        else:
            mask.plan = flex_plan(trees, window=window, device=device)
        return mask

    def detach(self) -> TreeMask:
        """Return the mask itself: it has no gradient, and reentrant checkpointing would make it a plain tensor."""
        return self


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers: (1, H, T, D) with a `TreeMask` -> (1, T, H, D); else sdpa."""
    if not isinstance(attention_mask, TreeMask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    added = [name for name in REFUSED if options.get(name) is not None]
    if added or dropout:
        raise ValueError(f"tree attention does not support {', '.join(added) or 'dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = tree_attention if isinstance(attention_mask.plan, list) else flex_tree_attention
    output = attend(query[0], key[0], value[0], attention_mask.plan, scale=scale)  # type: ignore[arg-type]
    return output.transpose(0, 1)[None], None


def _drops_attention(config: Any) -> bool:
    """Whether a model with this config has attention dropout in training; the keys differ between architectures."""
    return any(
        value
        for part in (config, config.get_text_config())
        for key, value in vars(part).items()
        if "att" in key and "drop" in key
    )


def _flex_works(model: PreTrainedModel, device: torch.device) -> bool:
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    few = getattr(config, "num_key_value_heads", None) or heads
    dtypes = {next(model.parameters()).dtype, torch.bfloat16}  # its own dtype, and that of autocast
    return all(flex_works(str(device), dtype, width, (heads, few)) for dtype in dtypes)


def use_tree_attention(model: PreTrainedModel) -> bool:
    """Let a model with sdpa use tree attention for a `TreeMask`; returns whether it can.

    This setting is not saved with the model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for inputs that are not packed: decoding, plain sequences
    if getattr(model.config, "_attn_implementation", None) == NAME:
        return True
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return False
    device = next(model.parameters()).device
    if _drops_attention(model.config) or not (device.type == "cpu" or _flex_works(model, device)):
        return False
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, TypeError, AttributeError):
        return False
    return model.config._attn_implementation == NAME


def use_sdpa(model: PreTrainedModel) -> None:
    """Undo `use_tree_attention`."""
    if getattr(model.config, "_attn_implementation", None) == NAME:
        model.set_attn_implementation("sdpa")
