"""Sample responses with a KV cache.

Each response is drawn from its own row of uniform numbers by inverting the cumulative distribution, so it does not
depend on the batching of prompts or on finished neighbours. Two policies with the same uniforms are compared with
common random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Response:
    """One sampled response. ids: its tokens, including the stop token if it ended; ended: false if it was cut."""

    ids: list[int]
    ended: bool
    logprobs: list[float]  # of each token under the sampler at its temperature, in nats


Choose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A decoder: logits (S, V), the ids so far (S, T), uniforms (S,) -> token ids (S,) and their log-probabilities (S,)."""


def draw_uniforms(count: int, response_length: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), (count, response_length) float64."""
    return torch.rand(count, response_length, generator=generator, dtype=torch.float64)


def widened(logits: Tensor) -> Tensor:
    """Logits in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def pick(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sample by inversion: the first token whose cumulative probability exceeds u.

    Args:
        logits: (S, V); this function divides them by `temperature` in at least fp32. uniforms: (S,) float64 in [0, 1).

    Returns:
        token ids (S,) and their log-probabilities (S,).
    """
    logits = widened(logits)  # before dividing, as the training forward does: bf16 would round the quotient
    logprobs = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # u is scaled by the total, so u < 1 always falls inside; a token of probability 0 has an empty interval.
    threshold = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    *,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    cache_config: Any = None,
    trunk: nn.Module | None = None,
    tokens: int | None = None,
    choose: Choose | None = None,
) -> list[Response]:
    """Sample one response per prompt, until a stop id or the width of `uniforms`.

    Args:
        model: called as model(input_ids, attention_mask, position_ids, past_key_values, ...) -> .logits; a wrapped
            module is called through its own `__call__`.
        prompts: token ids; this function pads them on the left; positions start at each prompt's first token.
        uniforms: (len(prompts), R).
        stop_ids: each ends a response and is a part of it. A stop token in the prompt has no effect.
        cache_config: the model's config, which determines the cache of each layer.
        trunk: see `prefill`. tokens: the number of ids that are tokens; later outputs are never sampled.
        choose: a decoder that replaces sampling at the temperature.
    """
    from rlhf_pipeline.rollout.prefill import can_drop_rows, prefill  # imports transformers

    count, limit = uniforms.shape
    uniforms, stops = uniforms.to(device), torch.tensor(list(stop_ids), device=device)
    # The last sampled token is never fed back.
    options = {"device": device, "cache_config": cache_config, "trunk": trunk}
    state = prefill(model, prompts, room=limit - 1, **options)
    alive, drops = torch.arange(count, device=device), can_drop_rows(state.cache)
    tokens_out = torch.zeros((count, limit), dtype=torch.long, device=device)
    asked = tokens_out[:, :0] if choose is None else padded_with_own(prompts).to(device)
    logprobs_out = torch.zeros((count, limit), dtype=torch.float32, device=device)
    lengths = torch.full((count,), limit, dtype=torch.long, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    for step in range(limit):
        logits, draws = state.logits[:, :tokens], uniforms[alive, step]
        if choose is None:
            drawn, logprobs = pick(logits, draws, temperature)
        else:
            drawn, logprobs = choose(logits, torch.cat([asked[alive], tokens_out[alive, :step]], dim=1), draws)
        tokens_out[alive, step] = drawn
        logprobs_out[alive, step] = logprobs.float()
        stopped = torch.isin(drawn, stops) & ~ended[alive]
        ended[alive[stopped]] = True
        lengths[alive[stopped]] = step + 1
        finished = ended[alive]
        if step + 1 == limit or bool(finished.all()):
            break
        keep = (~finished).nonzero().squeeze(-1)
        if keep.numel() < alive.numel() and drops:  # finished sequences leave the batch
            state.select(keep)
            alive, drawn = alive[keep], drawn[keep]
        state.advance(model, drawn)

    rows = zip(tokens_out.tolist(), logprobs_out.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    return [Response(ids[:n], end, logs[:n]) for ids, logs, n, end in rows]


def padded_with_own(prompts: Sequence[Sequence[int]]) -> Tensor:
    """The prompts' ids (S, W), padded on the left with each prompt's own first id: no prompt gets an id of another."""
    width = max(map(len, prompts))
    return torch.tensor([[ids[0]] * (width - len(ids)) + list(ids) for ids in prompts])


def length_groups(
    prompts: Sequence[Sequence[int]], batch_size: int, room: int = 0, positions: int | None = None
) -> list[list[int]]:
    """Row numbers in batches of prompts of similar length.

    Args:
        positions: the most positions of a batch's cache: its rows times its longest prompt with `room` more tokens. A
            single row may have more. None: no bound.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row)):
        rows = len(groups[-1]) + 1 if groups else 1
        fits = positions is None or rows * (len(prompts[row]) + room) <= positions
        if groups and rows <= batch_size and fits:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def sample_grouped(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    *,
    responses_at_once: int,
    positions: int | None = None,
    **options,
) -> list[Response]:
    """`sample` in the batches of `length_groups`; the responses are in the order of the prompts."""
    drawn: dict[int, Response] = {}
    for rows in length_groups(prompts, responses_at_once, uniforms.shape[1], positions):
        some = sample(model, [prompts[row] for row in rows], uniforms[rows], **options)
        drawn.update(zip(rows, some, strict=True))
    return [drawn[row] for row in range(len(prompts))]
