"""Sample K responses for each prompt of a set, as examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.forward import trunk_of
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import ActorCritic, Policy
from rlhf_pipeline.rollout.decoding import beam_search_grouped, chooser
from rlhf_pipeline.rollout.sampler import Response, draw_uniforms, length_groups, sample_grouped


def sample_for_prompts(
    policy: Policy | ActorCritic,
    prompts: Sequence[Example],
    *,
    samples: int,
    response_length: int,
    stop_ids: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator],
    temperature: float = 1.0,
    decoding: Decoding | None = None,
    responses_at_once: int,
    memory: Memory | None = None,
    device: torch.device | str = "cpu",
    module: Any = None,
) -> tuple[list[Example], list[list[Response]]]:
    """Sample `samples` responses for each prompt.

    The uniform numbers depend only on the generator's seed, the number of prompts, `samples` and `response_length`, so
    two policies with the same values use common random numbers.

    Args:
        prompts: examples; their completions are ignored. generator: several draw independent sets of `samples` in one
            pass over the prompts; completion i * n + c of an example is then response i of generator c of n.
        decoding: how responses are made where models are measured; it replaces the temperature, at which training
            samples the policy itself. responses_at_once: the number sampled in one batch (beams in beam search), halved
            when memory runs out. memory: keeps the halvings of a run. module: the wrapped module to call instead of
            `policy`.

    Raises:
        BadInput: the architecture cannot be decoded in batches. RunFailed: memory ran out after all halvings.

    Returns:
        the prompts as examples with the sampled completions, and the responses with their log-probabilities.
    """
    from rlhf_pipeline.rollout.prefill import cache_positions  # imports transformers

    if not policy.reader.decodes:
        raise BadInput(
            f"{type(policy.language_model).__name__}: left-padded decoding with a cache gives other logits than the "
            "model's forward pass, so sampling is impossible; expected a model with attention and a key-value cache"
        )
    decoding = decoding or Decoding(temperature=temperature)
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    each = [draw_uniforms(len(prompts) * samples, response_length, one) for one in generators]
    uniforms = torch.stack(each, dim=1).flatten(0, 1)
    ids = [prompt.prompt_ids for prompt in prompts for _ in range(samples * len(generators))]
    model = policy.language_model
    training = model.training
    model.eval()  # in training mode a checkpointed model uses no cache
    try:
        called = module if module is not None else policy
        options: dict[str, Any] = {
            "stop_ids": stop_ids,
            "device": device,
            "cache_config": model.config,
            "positions": cache_positions(model.config, device),
            "tokens": policy.reader.tokens,
            "trunk": trunk_of(model) if policy.reader.layout == "flat" else None,
        }
        most = min(responses_at_once, len(ids) * decoding.num_beams)
        if decoding.num_beams > 1:
            draw = partial(beam_search_grouped, called, ids, response_length, decoding, **options)
        else:
            options |= {"temperature": decoding.temperature, "choose": chooser(decoding)}
            draw = partial(sample_grouped, called, ids, uniforms, **options)
        drawn = (memory or Memory()).shrink("sampling", most, lambda size: draw(responses_at_once=size))
    finally:
        model.train(training)
    return answered(prompts, drawn)


def answered(prompts: Sequence[Example], drawn: Sequence[Response]) -> tuple[list[Example], list[list[Response]]]:
    """The prompts as examples with their responses (the same number for each), and the responses by prompt."""
    samples = len(drawn) // len(prompts)
    groups = [list(drawn[start : start + samples]) for start in range(0, len(drawn), samples)]
    sampled = [
        replace(
            prompt,
            completions=[response.ids for response in group],
            ended=[response.ended for response in group],
            label_probability=None,
            margin=None,
            completion_texts=(),
            ranks=None,
        )
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    return sampled, groups


def one_by_one(examples: Sequence[Example]) -> list[Example]:
    """Examples with one completion each, in order; those of one prompt are neighbours."""
    return [
        replace(example, completions=[ids], ended=[ended])
        for example in examples
        for ids, ended in zip(example.completions, example.ended, strict=True)
    ]


def logprob_matrix(drawn: Sequence[Response], width: int) -> torch.Tensor:
    """Log-probabilities (C, R) of the sampled tokens under their sampler, in nats; 0 at padding."""
    return torch.tensor([response.logprobs + [0.0] * (width - len(response.logprobs)) for response in drawn])


def prompts_run(
    policy: Policy | ActorCritic,
    sampled: Sequence[Example],
    responses_at_once: int,
    memory: Memory,
    *,
    response_length: int,
    device: torch.device | str,
) -> list[int] | None:
    """Lengths of the prompts that `sample_for_prompts` has computed, for a cost meter.

    Each batch computes a distinct prompt once; None if each response computed its own prompt.

    Args:
        sampled: the examples that `sample_for_prompts` has just returned, with the same values of the others.
    """
    from rlhf_pipeline.rollout.prefill import cache_positions, shares_prompts  # imports transformers

    if policy.reader.layout != "flat" or not shares_prompts(policy.language_model.config):
        return None
    prompts = [tuple(example.prompt_ids) for example in sampled for _ in example.completions]
    most = memory.fitting("sampling", min(responses_at_once, len(prompts)))
    return distinct_prompts(prompts, most, response_length, cache_positions(policy.language_model.config, device))


def distinct_prompts(
    prompts: Sequence[Sequence[int]], responses_at_once: int, room: int = 0, positions: int | None = None
) -> list[int]:
    """Lengths of the prompts that are computed if each batch of `length_groups` computes a distinct prompt once."""
    groups = length_groups(prompts, responses_at_once, room, positions)
    batches = ({tuple(prompts[row]) for row in rows} for rows in groups)
    return [len(prompt) for batch in batches for prompt in batch]
