"""The forward pass: hidden states of a packed batch, and the head on them.

A `Reader` describes how to read one architecture. Most causal models of transformers take a 4-D mask with position ids,
and their logits are a linear map of the last hidden state. `inspect_model` (selfcheck.py) checks both at load time; if
one does not hold, a slower, equally correct method is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.logprobs import OutputHead, token_logprobs
from rlhf_pipeline.algorithms.rows import product_dtype, rows_computed
from rlhf_pipeline.data.batch import Layout, PackedBatch
from rlhf_pipeline.models.last_layer import reading
from rlhf_pipeline.models.tree_attention import TreeMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PACKED: dict[Layout, str] = {
    "flat": "packed without padding",
    "trees": "packed in rows",
    "rows": "padded, a row for each completion",
}
"""What a layout means, for the log."""


@dataclass(frozen=True)
class Reader:
    """How to read an architecture.

    layout: the fastest layout that the attention can read (data/batch.py).
    head: "linear" if logits = W h + b, else "own" (the model's own forward computes the logits).
    decodes: whether left-padded, cached decoding gives the same logits, which sampling needs.
    tokens: the number of ids that are tokens; later outputs get no probability. None: all outputs are tokens.
    """

    layout: Layout = "trees"
    head: Literal["linear", "own"] = "linear"
    decodes: bool = True
    tokens: int | None = None

    def __str__(self) -> str:
        """Return what the log says of a model: its batches, and whatever is not as usual."""
        said = [f"batches {PACKED[self.layout]}"]
        said += ["logits by the model's own forward"] if self.head == "own" else []
        said += [] if self.decodes else ["it cannot sample (cached decoding gives other logits)"]
        said += [] if self.tokens is None else [f"its first {self.tokens:,} outputs are tokens"]
        return ", ".join(said)


def _allowed(batch: PackedBatch, window: int | None) -> Tensor:
    """The visible keys of each query, (B, 1, T, T) bool.

    Query q may see key k if both are in one tree, k is not later, and k is in the prompt or in q's own completion; with
    a sliding window, position(q) - position(k) < window must hold too.
    """
    tree, branch, position = batch.tree, batch.branch, batch.position_ids
    steps = torch.arange(tree.shape[1], device=tree.device)
    allowed = (tree[:, :, None] == tree[:, None, :]) & (steps[:, None] >= steps)
    allowed &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    if window is not None:
        allowed &= position[:, :, None] - position[:, None, :] < window
    return allowed[:, None]


def _as_kind(allowed: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    if attention != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def attention_mask(batch: PackedBatch, config: object, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The mask of a packed batch in the form that a model with this config accepts.

    A 2-D mask in the layout "rows", a `TreeMask` in the layout "flat", and a dict by layer type if full and sliding
    layers alternate.

    config: of the model; a composite model (text and images) has the keys of its attention in its text config.

    Raises:
        ValueError: a kind of layer whose mask is not known, in another layout than "rows".
    """
    if batch.layout == "rows":
        return (batch.tree >= 0).long()
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    attention = getattr(config, "_attn_implementation", "sdpa")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"the mask of {', '.join(sorted(unknown))} is not known")
    if window is not None and (window < 1 or getattr(config, "use_sliding_window", True) is False):
        window = None

    def mask(width: int | None) -> Tensor:
        if batch.layout == "flat":
            return TreeMask.of(batch.trees, width, dtype, batch.input_ids.device)
        return _as_kind(_allowed(batch, width), attention, dtype)

    if kinds == {"full_attention", "sliding_attention"}:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    return mask(None if kinds == {"full_attention"} else window)


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder below the head of a transformers model."""
    return cast("PreTrainedModel", model.base_model)


def _inputs(batch: PackedBatch, module: nn.Module) -> dict[str, Any]:
    mask = attention_mask(batch, module.config, next(module.parameters()).dtype)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def _filled_up(batch: PackedBatch, dtype: torch.dtype) -> PackedBatch:
    """A flat batch with a last tree that nobody reads, if its number of positions is expensive; see `rows_computed`."""
    ids = batch.input_ids
    more = rows_computed(ids.numel(), ids.device, product_dtype(ids.device, dtype)) - ids.numel()
    if batch.layout != "flat" or not more:
        return batch
    ids, positions = (nn.functional.pad(held, (0, more)) for held in (ids, batch.position_ids))
    return replace(batch, input_ids=ids, position_ids=positions, trees=(*batch.trees, (more, ())))


def hidden_states(trunk: nn.Module, batch: PackedBatch, index: Tensor | None = None) -> Tensor:
    """Last hidden states of a packed batch at flat positions `index` (K,): (K, D). Without `index`: all, (B * T, D)."""
    count = batch.input_ids.numel()
    batch = _filled_up(batch, next(trunk.parameters()).dtype)
    with reading(trunk, index, batch.input_ids.numel()):
        output = trunk(**_inputs(batch, trunk))
    flat = output.last_hidden_state.flatten(0, 1)
    return flat[:count] if index is None else flat.index_select(0, index)


def output_head(model: PreTrainedModel, temperature: float = 1.0, tokens: int | None = None) -> OutputHead:
    """The output head of a causal language model; `tokens`: see `Reader`."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return OutputHead(head.weight[:tokens], None if bias is None else bias[:tokens], temperature)


def predicting_logits(
    model: PreTrainedModel, batch: PackedBatch, index: Tensor | None = None, *, tokens: int | None = None
) -> Tensor:
    """Logits (N, V) at the predicting positions (or at `index`) by the model's own forward, in at least fp32.

    tokens: see `Reader`.
    """
    index = batch.predict_index if index is None else index
    logits = model(**_inputs(batch, model)).logits[..., :tokens].flatten(0, 1).index_select(0, index)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_token_logprobs(
    model: PreTrainedModel, reader: Reader, batch: PackedBatch, index: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of every next token at flat positions `index` (K,): (K, V) in nats, in at least fp32."""
    if reader.head == "linear":
        hidden = hidden_states(trunk_of(model), batch).index_select(0, index)
        return torch.log_softmax(output_head(model, temperature, reader.tokens).logits(hidden), dim=-1)
    return torch.log_softmax(predicting_logits(model, batch, index, tokens=reader.tokens) / temperature, dim=-1)


def completion_logprobs(
    model: PreTrainedModel,
    reader: Reader,
    batch: PackedBatch,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
    train_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probability of every completion token, entropy of its distribution, and the hidden states behind them.

    Returns:
        logprobs (N,) in nats, differentiable; entropy (N,) in nats, detached unless `train_entropy`, or None if not
        requested; hidden (N, D), or None if the model's own forward was used.
    """
    if reader.head == "linear":
        hidden = hidden_states(trunk_of(model), batch, batch.predict_index)
        head = output_head(model, temperature, reader.tokens)
        options = {"entropy": entropy, "train_entropy": train_entropy}
        return *token_logprobs(head, hidden, batch.target_ids, **options), hidden
    all_logprobs = torch.log_softmax(predicting_logits(model, batch, tokens=reader.tokens) / temperature, dim=-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and train_entropy):
        entropies = -(all_logprobs.exp() * all_logprobs).sum(-1) if entropy else None
    return all_logprobs.gather(-1, batch.target_ids[:, None]).squeeze(-1), entropies, None
