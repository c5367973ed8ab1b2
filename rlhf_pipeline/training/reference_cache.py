"""Log-probabilities of responses under a frozen reference, computed once and kept on disk.

The key consists of the reference's files, its dtype and every token id of the examples. If one of them changes, the
log-probabilities are computed again.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.examples import Example, part_sizes, parts_of, response_counts
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.rollout.scoring import most_responses, score
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.tensor_cache import read_tensor, write_tensor


@dataclass(frozen=True)
class ReferenceLogprobs:
    """logprobs: see `completion_logprob_sums`; hit: whether they were read from the cache."""

    logprobs: Tensor
    hit: bool

    def flops(self, shape: ModelShape, examples: Sequence[Example]) -> float:
        """FLOPs of one forward pass over the examples."""
        total = 0.0
        for prompt, *lengths in part_sizes(examples):
            context = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
            read = sum(lengths) - len(lengths) + 1  # the prompt's last token predicts the first of every completion
            total += shape.forward_flops(prompt + sum(lengths), context, sum(lengths), read)
        return total


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of examples, with their boundaries."""
    digest = sha256()
    for sizes, ids in parts_of(examples):
        digest.update(array("q", [len(sizes), *sizes]).tobytes())
        digest.update(ids.tobytes())
    return digest.hexdigest()


@torch.no_grad()
def completion_logprob_sums(
    policy: Policy,
    examples: Sequence[Example],
    *,
    responses_at_once: int,
    memory: Memory | None = None,
    device: torch.device | str,
) -> Tensor:
    """log pi(y | x) of every completion in nats, computed by `score`: (examples, K) on the CPU, in at least fp32.

    K is the largest number of completions of an example; examples with fewer are filled with NaN.
    """
    if not examples:
        return torch.zeros(0, 2)
    was_training = policy.training
    policy.eval()  # dropout is for training only
    try:
        found = _logprob_sums(policy, examples, responses_at_once=responses_at_once, memory=memory, device=device)
    finally:
        policy.train(was_training)
    most = most_responses(examples)
    rows = found.split(response_counts(examples))
    return torch.stack([pad(row, (0, most - len(row)), value=torch.nan) for row in rows])


def _logprob_sums(
    policy: Policy,
    examples: Sequence[Example],
    *,
    responses_at_once: int,
    memory: Memory | None,
    device: torch.device | str,
) -> Tensor:
    """(completions,) log-probabilities of all completions, one example after the other."""

    def sums(part: Sequence[Example]) -> Tensor:
        batch = pack(part, layout=policy.reader.layout).to(device)
        return batch.per_completion(policy(batch).logprobs)

    return score(sums, examples, responses_at_once=responses_at_once, memory=memory)


def _is_whole(logprobs: Tensor, examples: Sequence[Example]) -> bool:
    """Whether every completion's log-probability is finite."""
    return int(torch.isfinite(logprobs).sum()) == sum(response_counts(examples))


def cached_logprobs(
    policy: Policy,
    examples: Sequence[Example],
    cache: Path,
    key: dict[str, Any],
    *,
    agree: Callable[[bool], bool] = bool,
    **options,
) -> ReferenceLogprobs:
    """`completion_logprob_sums` of a frozen reference, from the cache if possible.

    Args:
        key: identifies the reference; without a digest (a model on the hub) nothing is cached.
        agree: whether something holds in every process that must make the same passes.
        options: options of `completion_logprob_sums`.
    """
    if key.get("model") is None or not examples:
        return ReferenceLogprobs(completion_logprob_sums(policy, examples, **options), False)
    content = {**key, "temperature": policy.temperature, "examples": examples_digest(examples)}
    name = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = cache / f"reference-{name[:32]}.safetensors"
    stored = read_tensor(path)  # None also for a damaged entry, which is computed again and replaced
    usable = stored is not None and stored.shape[0] == len(examples) and _is_whole(stored, examples)
    if agree(usable) and stored is not None:
        return ReferenceLogprobs(stored, True)
    logprobs = completion_logprob_sums(policy, examples, **options)
    if not _is_whole(logprobs, examples):  # the run stops at them; the next run must compute them again
        return ReferenceLogprobs(logprobs, False)
    write_tensor(path, logprobs)
    return ReferenceLogprobs(logprobs, False)
