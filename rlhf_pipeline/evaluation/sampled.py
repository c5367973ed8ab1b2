"""Figures of a policy's samples: reward, KL to the reference, length, end tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.algorithms.kl import k1, k3
from rlhf_pipeline.algorithms.logprobs import token_kl, token_logprobs
from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.data.batch import PackedBatch, common_layout, pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.statistics import Estimate, cluster_mean
from rlhf_pipeline.models.forward import hidden_states, output_head, predicting_logits, trunk_of
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.rollout.responses import sample_for_prompts
from rlhf_pipeline.rollout.rewards import RewardSource, world_verdicts
from rlhf_pipeline.rollout.scoring import score

SHARES = frozenset({"ended", "well_formed"})
OF_POLICY = ("kl", "kl_k1", "kl_k3", "entropy")
"""Figures of the policy itself: they are measured on its own samples, whatever decoder makes the responses."""


@dataclass(frozen=True)
class SamplingPlan:
    """A plan of sampling: every policy with the same plan has the same prompts and random numbers."""

    prompts: list[Example]
    samples: int
    response_length: int
    decoding: Decoding
    seed: int
    stop_ids: Sequence[int]
    responses_at_once: int
    memory: Memory = field(default_factory=Memory)
    device: torch.device | str = "cpu"


@dataclass
class Samples:
    """Responses of one policy and their figures, one array entry per response, prompts in order.

    coupled: whether they were drawn with random numbers, which are the same for every policy with the same plan.
    facts: how they were made, as JSON has it, if the policy had demonstrations in its context.
    """

    examples: list[Example]
    clusters: list[str]  # prompt of each response
    values: dict[str, np.ndarray] = field(default_factory=dict)
    coupled: bool = True
    facts: dict[str, Any] | None = None

    def by_prompt(self, name: str) -> np.ndarray:
        """One figure of each prompt's responses, (P, A)."""
        return self.values[name].reshape(len(self.examples), -1)

    def estimate(self, name: str) -> Estimate:
        """Mean of one figure with an interval clustered by prompt."""
        return cluster_mean(self.values[name], self.clusters, share=name in SHARES)

    def table(self) -> dict[str, Estimate]:
        """All figures with their intervals."""
        return {name: self.estimate(name) for name in self.values}


def draw(policy: Policy, plan: SamplingPlan, seeds: Sequence[int] | None = None) -> Samples:
    """Sample by a plan; the figures so far: length (tokens with the end token) and ended.

    seeds: they replace the plan's seed; each draws the plan's samples, see `sample_for_prompts`.
    """
    examples, _ = sample_for_prompts(
        policy,
        plan.prompts,
        samples=plan.samples,
        response_length=plan.response_length,
        stop_ids=plan.stop_ids,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds or (plan.seed,)],
        decoding=plan.decoding,
        responses_at_once=plan.responses_at_once,
        memory=plan.memory,
        device=plan.device,
    )
    clusters = [example.prompt_key for example in examples for _ in example.completions]
    found = Samples(examples, clusters, coupled=plan.decoding.do_sample)
    found.values["length"] = np.array([len(ids) for e in examples for ids in e.completions], dtype=np.float64)
    found.values["ended"] = np.array([flag for e in examples for flag in e.ended], dtype=np.float64)
    return found


def add_score(samples: Samples, source: RewardSource, name: str, plan: SamplingPlan) -> None:
    """Add the score of a reward source to each response."""
    samples.values[name] = scores_of(samples, source, plan)


def add_world_reward(samples: Samples) -> None:
    """Add `true_reward` and `well_formed` of responses in the built-in world."""
    verdicts = world_verdicts(samples.examples)
    samples.values["true_reward"] = verdicts.reward
    samples.values["well_formed"] = verdicts.well_formed.astype(np.float64)


def scores_of(samples: Samples, source: RewardSource, plan: SamplingPlan) -> np.ndarray:
    """(C,) scores of all responses by a reward source."""
    scores = score(source.score, samples.examples, responses_at_once=plan.responses_at_once, memory=plan.memory)
    return scores.double().numpy()


@dataclass(frozen=True)
class Divergence:
    """Values per completion token, (N,) in nats: log-probabilities under both models, entropy of the policy, exact KL.

    The KL is that of the next-token distributions at the token's position: sum_v pi(v) log(pi(v) / pi_ref(v)).
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor


@torch.no_grad()
def divergence(policy: Policy, reference: Policy, batch: PackedBatch, plain: PackedBatch | None = None) -> Divergence:
    """Score a packed batch under a policy and a reference. Both must be able to read its layout.

    plain: what the reference reads, if it is not `batch`: the same responses to other prompts.
    """
    plain = batch if plain is None else plain
    if policy.reader.head == reference.reader.head == "linear":
        scored = []
        for one, read in ((policy, batch), (reference, plain)):
            hidden = hidden_states(trunk_of(one.model), read, read.predict_index)
            head = output_head(one.model, one.temperature, one.reader.tokens)
            scored.append((head, hidden, *token_logprobs(head, hidden, read.target_ids, entropy=one is policy)))
        (head, hidden, logprobs, entropy), (ref_head, ref_hidden, ref_logprobs, _) = scored
        assert entropy is not None  # the policy was asked for it
        return Divergence(logprobs, ref_logprobs, entropy, token_kl(head, hidden, ref_head, ref_hidden))
    mine, theirs = (
        torch.log_softmax(predicting_logits(one.model, read, tokens=one.reader.tokens) / one.temperature, -1)
        for one, read in ((policy, batch), (reference, plain))
    )
    target = batch.target_ids[:, None]
    return Divergence(
        mine.gather(-1, target).squeeze(-1),
        theirs.gather(-1, target).squeeze(-1),
        -(mine.exp() * mine).sum(-1),
        (mine.exp() * (mine - theirs)).sum(-1),
    )


def with_prompts(examples: Sequence[Example], prompts: Mapping[str, list[int]]) -> list[Example]:
    """The examples with other token ids of their prompts, by `prompt_key`."""
    return [replace(example, prompt_ids=prompts[example.prompt_key]) for example in examples]


def add_kl(
    samples: Samples,
    policy: Policy,
    reference: Policy,
    plan: SamplingPlan,
    contexts: Mapping[str, list[int]] | None = None,
) -> None:
    """Add, per response and in nats: `kl` (sum over its positions of the exact KL over the vocabulary, the unbiased
    estimate with the least noise), `kl_k1` (log-ratio of the response), `kl_k3` (sum of k3 over its positions) and
    `entropy` (summed likewise).

    contexts: the prompts that the policy has read in place of the samples' own, which the reference reads; see
        `with_prompts`.
    """
    layout = common_layout(policy.reader.layout, reference.reader.layout)

    def sums(part: Sequence[Example]) -> Tensor:
        plain = pack(part, layout=layout).to(plan.device)
        batch = plain if contexts is None else pack(with_prompts(part, contexts), layout=layout).to(plan.device)
        found = divergence(policy, reference, batch, plain)
        ratios = k1(found.logprobs, found.ref_logprobs), k3(found.logprobs, found.ref_logprobs)
        columns = [found.kl, *ratios, found.entropy]
        return torch.stack([batch.per_completion(column.double()) for column in columns], dim=1)

    found = score(sums, samples.examples, responses_at_once=plan.responses_at_once, memory=plan.memory)
    for name, column in zip(OF_POLICY, found.numpy().T, strict=True):
        samples.values[name] = column


def take_from_policy(samples: Samples, own: Samples) -> None:
    """Add to a decoder's responses the figures of the policy itself, from equally many of its own samples."""
    samples.values |= {name: own.values[name] for name in OF_POLICY if name in own.values}


def paired_difference(mine: Samples, theirs: Samples, name: str) -> Estimate:
    """Mean of mine minus theirs, prompt by prompt.

    With common random numbers a difference of means stays unbiased and its interval is shorter.
    """
    a, b = mine.by_prompt(name).mean(1), theirs.by_prompt(name).mean(1)
    return cluster_mean(a - b, [example.prompt_key for example in mine.examples])
