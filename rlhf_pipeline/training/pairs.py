"""What the stages on preference pairs share: denominators and views of (C,) tensors as pairs."""

from __future__ import annotations

from torch import Tensor

from rlhf_pipeline.data.tokenize import Example


def count_pairs(example: Example) -> dict[str, float]:
    """A pair's share of the denominators."""
    return {
        "pairs": 1.0,
        "tokens": float(sum(len(ids) for ids in example.completions)),
        "chosen_tokens": float(len(example.completions[0])),
        "rejected_tokens": float(len(example.completions[1])),
    }


def split_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Completion values (2P,), chosen and rejected alternating, as two of (P,)."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected
