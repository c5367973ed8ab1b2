"""Some of many examples, by the hashes of their prompts: the same ones whatever their order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

from rlhf_pipeline.data.examples import Example, pick, prompt_keys
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.errors import DataError, Fault

Item = TypeVar("Item", Record, Example)


def hold_out(examples: Sequence[Example], size: float) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the examples to train on and those to evaluate on: whole prompts, in the order of their hashes.

    Args:
        size: how many examples to evaluate on, at least; below 1: a fraction of all.

    Raises:
        DataError: no example is left to train on.
    """
    wanted = int(size) if size >= 1 else math.ceil(size * len(examples))
    keys = prompt_keys(examples)
    rows = Counter(keys)
    held: set[str] = set()
    for key in sorted(rows, key=lambda key: sha256(f"held out {key}".encode()).hexdigest()):
        if wanted <= 0:
            break
        held.add(key)
        wanted -= rows[key]
    train = [number for number, key in enumerate(keys) if key not in held]
    if not train:
        found = f"{size:g} leaves none of {len(examples)} examples of {len(rows)} prompts for training"
        raise DataError(Fault("test_split_size", found, "a smaller number"))
    return pick(examples, train), pick(examples, [number for number, key in enumerate(keys) if key in held])


def lowest_hashes(items: list[Item], limit: int | None) -> list[Item]:
    """Return the `limit` records or examples with the lowest hashes, in their original order."""
    if limit is None or len(items) <= limit:
        return items
    return [items[index] for index in lowest_of([item.prompt_key for item in items], limit)]


def lowest_examples(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """Return the `limit` examples with the lowest hashes, in their original order."""
    if limit is None or len(examples) <= limit:
        return examples
    return pick(examples, lowest_of(prompt_keys(examples), limit))


def lowest_of(keys: Sequence[str], limit: int | None) -> list[int]:
    """Return the numbers of the `limit` keys with the lowest hashes, in their original order."""
    if limit is None or len(keys) <= limit:
        return list(range(len(keys)))
    # The hash is of the prompt and of the row's number among those of the prompt: the prompt's own hash decides the
    # split, and a source with many rows per prompt should not lose whole prompts.
    seen: Counter[str] = Counter()
    places = []
    for index, key in enumerate(keys):
        places.append((sha256(f"sample {key} {seen[key]}".encode()).hexdigest(), index))
        seen[key] += 1
    return sorted(index for _, index in sorted(places)[:limit])
