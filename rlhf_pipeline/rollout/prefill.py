"""Run prompts into a key-value cache and return the next-token logits: the first half of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from rlhf_pipeline.data.batch import FILLER
from rlhf_pipeline.data.processes import machine_memory
from rlhf_pipeline.models.last_layer import reading
from rlhf_pipeline.models.tree_attention import TreeMask


class RoomyLayer(DynamicLayer):
    """A cache layer with room for all later tokens: a new token is written in place, without copying the others."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.used = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stores = [
            states.new_empty(*states.shape[:2], self.room, states.shape[3]) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.used + key_states.shape[2]
        assert end <= self.room, f"{end} positions in a cache of {self.room}"
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, self.used : end] = states
        self.used = end
        return self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (store[:, :, : self.used] for store in self.stores)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = [store.new_empty(len(indices), *store.shape[1:]) for store in self.stores]
        for new, old in zip(kept, self.stores, strict=True):
            new[:, :, : self.used] = old[:, :, : self.used].index_select(0, indices)
        self.stores = kept
        self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


@dataclass
class Prefilled:
    """A filled cache. logits: (S, V) for the next token of each row. attention: (S, W), 0 at the left padding.

    positions: (S,) positions of each row's last token.
    """

    logits: Tensor
    cache: Cache
    attention: Tensor
    positions: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept several times. `logits` are not changed."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.attention, self.positions = self.attention[rows], self.positions[rows]

    def advance(self, model: Callable[..., Any], tokens: Tensor) -> None:
        """Run one more token of each row, (S,), through the model."""
        self.positions = self.positions + 1
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(tokens), 1)], dim=1)
        self.logits = model(
            input_ids=tokens[:, None],
            attention_mask=self.attention,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def can_drop_rows(cache: Cache) -> bool:
    """Whether rows can be taken out of a cache: not where a layer keeps a recurrent state (linear attention, Mamba)."""
    return all(
        hasattr(layer, "batch_select_indices") and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    )


def shares_prompts(config: Any) -> bool:
    """Whether every cache layer keeps all tokens, so that a prompt can be run once for several rows."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def cache_positions(config: Any, device: torch.device | str) -> int | None:
    """The most positions of a batch's key-value cache: those that take a quarter of the machine's memory in fp32.

    On a CPU the system kills a process that takes too much, so there is no error after which a batch could be halved.
    None: no bound, on other devices and where the config does not say how large a position is.
    """
    total, text = machine_memory()[0], config.get_text_config(decoder=True)

    def size(name: str) -> int:
        found = getattr(text, name, None)
        return found if isinstance(found, int) else 0

    heads = size("num_attention_heads")
    width = size("head_dim") or size("hidden_size") // max(1, heads)
    numbers = 2 * size("num_hidden_layers") * (size("num_key_value_heads") or heads) * width
    if total is None or not numbers or torch.device(device).type != "cpu":
        return None
    return max(1, total // 4 // (4 * numbers))


def _roomy_cache(config: Any, room: int) -> Cache:
    """A cache with room if every layer keeps all tokens, else the cache that the model's config requires."""
    plain = DynamicCache(config=config)
    return Cache(layers=[RoomyLayer(room) for _ in plain.layers]) if shares_prompts(config) else plain


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> Tensor:
    rows = [torch.tensor(ids) for ids in prompts]
    return pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")


def prefill(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    *,
    room: int,
    device: torch.device | str = "cpu",
    cache_config: Any = None,
    trunk: nn.Module | None = None,
) -> Prefilled:
    """Run the prompts through a model.

    Args:
        model: see `sample`. room: the number of tokens that will follow the prompts.
        trunk: the trunk of a model that reads the layout "flat"; each distinct prompt is then computed once, without
            padding. None: the prompts are padded on the left.
    """
    width = max(map(len, prompts))
    attention = _left_padded([[1] * len(ids) for ids in prompts], 0).to(device)
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    cache = _roomy_cache(cache_config, width + room)
    if trunk is not None and any(isinstance(layer, RoomyLayer) for layer in cache.layers):
        return _prefill_flat(model, prompts, cache, attention, positions[:, -1], cache_config, trunk)
    logits = model(
        input_ids=_left_padded(prompts, FILLER).to(device),
        attention_mask=attention,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return Prefilled(logits, cache, attention, positions[:, -1])


def _prefill_flat(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    attention: Tensor,
    positions: Tensor,
    config: Any,
    trunk: nn.Module,
) -> Prefilled:
    device = attention.device
    number: dict[tuple[int, ...], int] = {}
    which = torch.tensor([number.setdefault(tuple(ids), len(number)) for ids in prompts], device=device)
    lengths = torch.tensor([len(ids) for ids in number], device=device)
    ends = lengths.cumsum(0)
    ids = torch.tensor([token for prompt in number for token in prompt], device=device)
    flat_positions = torch.arange(len(ids), device=device) - torch.repeat_interleave(ends - lengths, lengths)
    plain = DynamicCache(config=config)
    mask = TreeMask.of([(len(prompt), ()) for prompt in number], None, next(trunk.parameters()).dtype, device)
    with reading(trunk, ends - 1):
        logits = model(
            input_ids=ids[None],
            attention_mask=mask,
            position_ids=flat_positions[None],
            past_key_values=plain,
            use_cache=True,
            logits_to_keep=ends - 1,
        ).logits[0]
    # The source of each column of the padded cache; columns to the left of a prompt are masked.
    columns = torch.arange(attention.shape[1], device=device) - attention.shape[1]
    source = (ends[which][:, None] + columns).clamp_min(0).flatten()
    for roomy, layer in zip(cache.layers, plain.layers, strict=True):
        assert isinstance(roomy, RoomyLayer) and isinstance(layer, DynamicLayer)  # guaranteed on this path
        keys, values = (
            states[0].index_select(1, source).unflatten(1, attention.shape).transpose(0, 1)
            for states in (cast(Tensor, layer.keys), cast(Tensor, layer.values))
        )
        roomy.update(keys, values)
    return Prefilled(logits.index_select(0, which), cache, attention, positions)
