"""Log-probabilities of responses under a frozen reference, computed once and kept on disk.

The key is made of the reference's files, its number type and every token id of the examples: whatever changes one
of them misses the cache.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import micro_batches, pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.roles import Policy
from rlhf_pipeline.training.cost import ModelShape


@dataclass(frozen=True)
class Reference:
    """logprobs: (examples, K), summed over each response's tokens; hit: whether they came from the disk."""

    logprobs: Tensor
    hit: bool

    def flops(self, shape: ModelShape, examples: Sequence[Example]) -> float:
        """What one forward pass over the examples costs."""
        total = 0.0
        for example in examples:
            prompt = len(example.prompt_ids)
            lengths = [len(ids) for ids in example.completions]
            context = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
            read = sum(lengths) - len(lengths) + 1  # the prompt's last token predicts the first of every completion
            total += shape.forward_flops(prompt + sum(lengths), context, sum(lengths), read)
        return total


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of examples, with their boundaries."""
    digest = sha256()
    for example in examples:
        parts = [example.prompt_ids, *example.completions]
        digest.update(array("q", [len(parts), *(len(part) for part in parts)]).tobytes())
        for part in parts:
            digest.update(array("q", part).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def completion_logprob_sums(
    policy: Policy, examples: Sequence[Example], *, batch_size: int, pad_id: int, device: torch.device | str
) -> Tensor:
    """log pi(y | x) of every completion: (examples, K) on the CPU, in at least fp32; all with the same K."""
    if not examples:
        return torch.zeros(0, 2)
    rows: list[Tensor | None] = [None] * len(examples)
    for group in micro_batches(examples, batch_size):
        batch = pack([examples[i] for i in group], pad_id, layout=policy.reader.layout).to(device)
        sums = batch.per_completion(policy(batch).logprobs).cpu()
        for i, row in zip(group, sums.view(len(group), -1), strict=True):
            rows[i] = row
    return torch.stack(rows)  # type: ignore[arg-type]


def cached_logprobs(
    policy: Policy, examples: Sequence[Example], cache: Path, key: dict[str, Any], **options
) -> Reference:
    """`completion_logprob_sums` of a frozen reference, from the cache where it is there.

    Args:
        key: what identifies the reference; without a digest (a model on the hub) nothing is cached.
        options: batch_size, pad_id, device.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if key.get("model") is None or not examples:
        return Reference(completion_logprob_sums(policy, examples, **options), False)
    content = {**key, "temperature": policy.temperature, "examples": examples_digest(examples)}
    name = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = cache / f"reference-{name[:32]}.safetensors"
    if path.is_file():
        try:
            stored = load_file(path)["logprobs"]
            if stored.shape[0] == len(examples):
                return Reference(stored, True)
        except (SafetensorError, KeyError, OSError):
            pass  # a damaged cache entry is as good as none: it is computed again and replaced
    logprobs = completion_logprob_sums(policy, examples, **options)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({"logprobs": logprobs.contiguous()}, temporary)
    os.replace(temporary, path)
    return Reference(logprobs, False)
