"""Decoders where models are measured: transformers' logits processors on the sampler's cache, and beam search on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.rollout.sampler import Choose, Response, length_groups, padded_with_own, pick, widened

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

ABSENT = -1e9
"""The log-probability of beams that do not exist yet: every beam of a prompt but the first, at the first token."""


def processors(decoding: Decoding) -> LogitsProcessorList:
    """The processors of a decoder, in the order of transformers' `generate`."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    found = LogitsProcessorList()
    if decoding.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if not decoding.do_sample:
        return found
    if decoding.temperature != 1.0:
        found.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        found.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        found.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        found.append(MinPLogitsWarper(decoding.min_p))
    if decoding.typical_p < 1.0:
        found.append(TypicalLogitsWarper(decoding.typical_p))
    return found


def chooser(decoding: Decoding) -> Choose | None:
    """How a decoder chooses the next token: from the processed logits by inversion, or the likeliest one.

    None for a decoder that samples the policy itself. A token that is chosen without chance has the log-probability 0.
    """
    if decoding.is_plain:
        return None
    process = processors(decoding)

    def choose(logits: Tensor, ids: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        scores = process(cast(torch.LongTensor, ids), widened(logits))
        if decoding.do_sample:
            return pick(scores, uniforms)
        return scores.argmax(-1), scores.new_zeros(len(scores))

    return choose


@torch.no_grad()
def beam_search(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    response_length: int,
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    device: torch.device | str = "cpu",
    cache_config: Any = None,
    trunk: nn.Module | None = None,
    tokens: int | None = None,
) -> list[Response]:
    """For each prompt the response y with the largest log p(y | x) / |y|^length_penalty that beam search finds.

    It follows transformers' `generate` with `early_stopping: false`. Each prompt has `num_beams` beams: its likeliest
    prefixes that have not ended. Of all continuations of the beams by one token, those that end and are among the
    `num_beams` likeliest are finished; at `response_length` all of these end. The search stops when there are
    `num_beams` finished responses and the likeliest beam, at its length so far, has no better score than the worst of
    them. The repetition penalty is applied to log-probabilities.

    Args: see `sample`.
    """
    from rlhf_pipeline.rollout.prefill import prefill  # imports transformers

    width, process = decoding.num_beams, processors(decoding)
    rows = [ids for ids in prompts for _ in range(width)]
    options = {"device": device, "cache_config": cache_config, "trunk": trunk}
    state = prefill(model, rows, room=response_length - 1, **options)
    read = padded_with_own(rows).to(device)  # the ids of each beam; those of its response begin at `start`
    start, stops = read.shape[1], torch.tensor(list(stop_ids), device=device)
    found: list[list[tuple[float, Response]]] = [[] for _ in prompts]  # the finished responses, the best first
    searched = list(range(len(prompts)))  # prompts whose search goes on; their beams are the rows
    sums = torch.full((len(prompts), width), ABSENT, device=device)
    sums[:, 0] = 0.0

    for length in range(1, response_length + 1):
        logprobs = torch.log_softmax(widened(state.logits[:, :tokens]), dim=-1)
        logprobs = process(cast(torch.LongTensor, read), logprobs)
        totals = (sums.view(-1, 1) + logprobs).view(len(searched), -1)
        # So many that `width` of them have not ended.
        best, places = totals.topk((1 + max(1, len(stops))) * width)
        size = logprobs.shape[-1]
        beams, next_ids = places // size, places % size
        beams += torch.arange(len(searched), device=device)[:, None] * width
        stopped = torch.isin(next_ids, stops)
        ended = stopped if length < response_length else torch.ones_like(stopped)
        for place, rank in ended[:, :width].nonzero().tolist():
            score = best[place, rank].item()
            if score <= ABSENT / 2:
                continue
            ids = [*read[beams[place, rank], start:].tolist(), int(next_ids[place, rank])]
            finished = found[searched[place]]
            response = Response(ids, bool(stopped[place, rank]), [0.0] * len(ids))
            finished.append((score / length**decoding.length_penalty, response))
            finished.sort(key=lambda one: -one[0])
            del finished[width:]
        if length == response_length:
            break
        sums, ranks = best.masked_fill(ended, -torch.inf).topk(width)
        hopes = (sums[:, 0] / length**decoding.length_penalty).tolist()
        keep = [
            place
            for place, prompt in enumerate(searched)
            if len(found[prompt]) < width or hopes[place] > found[prompt][-1][0]
        ]
        if not keep:
            break
        searched, sums = [searched[place] for place in keep], sums[keep]
        parents, chosen = (values.gather(1, ranks)[keep].flatten() for values in (beams, next_ids))
        read = torch.cat([read[parents], chosen[:, None]], dim=1)
        state.select(parents)
        state.advance(model, chosen)
    return [finished[0][1] for finished in found]


def beam_search_grouped(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    response_length: int,
    decoding: Decoding,
    *,
    responses_at_once: int,
    positions: int | None = None,
    **options,
) -> list[Response]:
    """`beam_search` in batches of prompts of similar length, with `responses_at_once` beams in all."""
    found: dict[int, Response] = {}
    most = None if positions is None else positions // decoding.num_beams
    for rows in length_groups(prompts, max(1, responses_at_once // decoding.num_beams), response_length, most):
        some = beam_search(model, [prompts[row] for row in rows], response_length, decoding, **options)
        found.update(zip(rows, some, strict=True))
    return [found[row] for row in range(len(prompts))]
