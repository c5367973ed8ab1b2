"""Score given responses, a bounded number at a time; every measurement uses this module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from rlhf_pipeline.data.examples import Example, part_sizes, response_counts
from rlhf_pipeline.models.memory import Memory

Scorer = Callable[[Sequence[Example]], Tensor]
"""A function from examples to (C, ...): one row for each of their C responses, in their order."""

Place = tuple[int, int]
"""An example and one of its responses, by number."""

TOKENS_AT_ONCE = 32_768
"""Tokens in one call at most, unless one response has more: on a CPU the system kills a process that takes too much."""


@torch.no_grad()
def score(
    scorer: Scorer, examples: Sequence[Example], *, responses_at_once: int, memory: Memory | None = None
) -> Tensor:
    """Apply a scorer to every response of some examples.

    Responses are scored in the order of their lengths, at most `responses_at_once` and TOKENS_AT_ONCE tokens in one
    call; both are halved when memory runs out.

    Args:
        examples: at least one. memory: keeps the halvings of a run.

    Returns:
        (C, ...) on the CPU, the responses in the order of the examples.

    Raises:
        RunFailed: three halvings were not enough, or a single response does not fit.
    """
    memory = memory or Memory()
    sizes = list(part_sizes(examples))
    totals = [sum(numbers) for numbers in sizes]
    places = [(number, k) for number, (_, *lengths) in enumerate(sizes) for k in range(len(lengths))]
    order = sorted(range(len(places)), key=lambda index: -totals[places[index][0]])  # equal ones keep their order
    left = [places[index] for index in order]
    most, found = min(responses_at_once, len(places)), []

    def some(size: int) -> tuple[int, Tensor]:
        read = _fitting(sizes, left[:size], TOKENS_AT_ONCE * size // most)
        return len(read), scorer(list(_trees(examples, read))).cpu()

    while left:
        read, values = memory.shrink("evaluation", most, some)
        found.append(values)
        left = left[read:]
    values = torch.cat(found)
    return torch.empty_like(values).index_copy_(0, torch.tensor(order), values)


def _fitting(sizes: Sequence[Sequence[int]], places: Sequence[Place], most: int) -> Sequence[Place]:
    """The first places whose prompts, each counted once, and responses have at most so many tokens; one at least.

    sizes: the tokens of each example's prompt and of each of its responses.
    """
    tokens, prompt = 0, -1
    for count, (number, k) in enumerate(places):
        tokens += sizes[number][1 + k] + (sizes[number][0] if number != prompt else 0)
        prompt = number
        if tokens > most and count:
            return places[:count]
    return places


def _trees(examples: Sequence[Example], places: Sequence[Place]) -> Iterator[Example]:
    """Examples with only the responses at `places`; responses of one example share its prompt."""
    for number, group in groupby(places, key=lambda place: place[0]):
        example, chosen = examples[number], [k for _, k in group]
        if len(chosen) == len(example.completions):
            yield example
        else:
            completions, ended = ([values[k] for k in chosen] for values in (example.completions, example.ended))
            yield replace(example, completions=completions, ended=ended)


def by_example(values: Tensor, examples: Sequence[Example]) -> list[list[float]]:
    """Split values (C,) of responses into one list per example."""
    return [part.tolist() for part in values.split(response_counts(examples))]


def most_responses(examples: Sequence[Example]) -> int:
    """The largest number of responses of an example; 1 without examples."""
    return max(response_counts(examples), default=1)
