"""`icdpo:REF`, in-context DPO (Song et al. 2024, arXiv:2402.09320): demonstrations retrieved for each prompt, and
the one of n candidates with the highest contrast, without training:

    S(x, y) = log pi(y | d, x) - log pi(y | x)            one-sided
    S(x, y) = log pi(y | d+, x) - log pi(y | d-, x)       two-sided: d- has the rejected responses of the same prompts

S orders candidates; it is no reward in nats. A candidate that is equal or nearly equal to a response of its own
demonstrations is left out: copies have the highest S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.data.samples import lowest_examples
from rlhf_pipeline.data.tokenizers import text_of
from rlhf_pipeline.errors import ConfigError, DataError, Fault, first_line
from rlhf_pipeline.evaluation.best_of_n import kl_bound
from rlhf_pipeline.evaluation.in_context import bm25, choose, cosines, is_copy, nearest, words
from rlhf_pipeline.evaluation.preference_metrics import accuracy
from rlhf_pipeline.evaluation.sampled import Samples, SamplingPlan, with_prompts
from rlhf_pipeline.evaluation.statistics import Estimate
from rlhf_pipeline.measure.bench import Bench, add_rewards
from rlhf_pipeline.measure.contexts import (
    Contexts,
    Pool,
    add_tokens,
    contexts_of,
    draw_in_context,
    pool_of,
    settings_of,
)
from rlhf_pipeline.measure.embeddings import prompt_embeddings
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.rollout.scoring import by_example, score
from rlhf_pipeline.training.reference_cache import completion_logprob_sums

STREAM = 1_000_003
"""Between the seeds of two candidates: the first has the plan's random numbers, as the response of any other policy."""

LOG_P = "log p of "
"""The scorer that prefers the response that the policy gives a higher probability, without demonstrations."""


def icdpo(bench: Bench, arm: Resolved, scorer: RewardSource | None = None) -> Samples:
    """Return the best of n candidates for each response of the plan; see `measure_in_context`.

    Further figures of a response: `copies`, the share of its candidates that are copies; `only_copies`, 1 if all are,
    and the first of them is the response; `tokens_generated` of all candidates. `kl` is an upper bound:

        KL <= log n - (n - 1) / n + E[log pi(y | d, x) - log pi_ref(y | x)]          (Beirami et al. 2024)
    """
    policy, plan, settings = bench.policy(arm.policy), bench.plan, settings_of(bench.config)
    pool, n = _pool(bench, arm), settings.candidates
    demonstrations = retrieved(bench, arm, pool, plan.prompts)
    contexts = contexts_of(bench, arm, plan.prompts, demonstrations)
    against = _against(bench, arm, plan.prompts, demonstrations)
    candidates = draw_candidates(policy, plan, contexts, n)
    mine, theirs = (_sums(bench, policy, candidates, read).numpy() for read in (contexts, against))
    copies = np.array([_copies(one, shown) for one, shown in zip(candidates, demonstrations, strict=True)])
    shape = len(candidates), plan.samples, n
    chosen = choose((mine - theirs).reshape(shape), copies.reshape(shape))
    samples = picked(candidates, chosen.tolist())
    add_rewards(bench, samples, scorer)
    add_tokens(samples, contexts)
    lengths = np.array([[len(ids) for ids in one.completions] for one in candidates], dtype=np.float64)
    read = np.array([[2 * len(contexts[one.prompt_key]) + len(against[one.prompt_key])] for one in candidates])
    samples.values["tokens_read"] = (read + 3 * lengths).reshape(shape).sum(-1).flatten()
    samples.values["tokens_generated"] = lengths.reshape(shape).sum(-1).flatten()
    samples.values["copies"] = copies.reshape(shape).mean(-1).flatten()
    samples.values["only_copies"] = copies.reshape(shape).all(-1).flatten().astype(np.float64)
    reference = bench.reference_policy()
    if reference is not None:
        best = np.take_along_axis(mine.reshape(shape), chosen[..., None], -1).flatten()
        plain = completion_logprob_sums(reference, samples.examples, **bench.reading).double().numpy().flatten()
        samples.values["kl"] = kl_bound(n) + best - plain
    samples.facts = {
        "method": arm.method,
        "source": pool.source,
        "demonstrations": settings.demonstrations,
        "pool": len(pool.examples),
        "candidates": n,
        "score": settings.score,
        "retrieval": settings.retrieval,
        "kl_is_bound": True,
    }
    return samples


def _pool(bench: Bench, arm: Resolved) -> Pool:
    """The demonstrations of an arm; for the two-sided score, pairs.

    Raises:
        ConfigError: the two-sided score has no rejected responses.
    """
    if settings_of(bench.config).score == "one_sided":
        return pool_of(bench, arm)
    try:
        return pool_of(bench, arm, "pair")
    except DataError as error:
        found = f"two_sided reads rejected responses, but {first_line(error)}"
        raise ConfigError(Fault("in_context.score", found, "a source of pairs", "set in_context.source")) from None


def retrieved(bench: Bench, arm: Resolved, pool: Pool, prompts: Sequence[Example]) -> list[list[Example]]:
    """The demonstrations of each prompt: those with the most similar prompts, the most similar one last."""
    settings, own = settings_of(bench.config), np.array([one.prompt_key for one in pool.examples])
    both = prompts, pool.examples
    if settings.retrieval == "bm25":
        texts = ([one.prompt_text or text_of(bench.tokenizer, one.prompt_ids) for one in part] for part in both)
        similar = bm25(*(list(map(words, part)) for part in texts))
    else:
        policy = bench.policy(arm.policy)
        similar = cosines(*(prompt_embeddings(policy, part, **bench.reading).numpy() for part in both))
    found = []
    for prompt, scores in zip(prompts, similar, strict=True):
        places = nearest(np.where(own == prompt.prompt_key, -np.inf, scores), settings.demonstrations)
        found.append([pool.examples[place] for place in places])
    return found


def _against(
    bench: Bench, arm: Resolved, prompts: Sequence[Example], demonstrations: Sequence[Sequence[Example]]
) -> Contexts:
    """What the subtracted log-probability reads: the prompt alone, or behind the rejected responses."""
    if settings_of(bench.config).score == "one_sided":
        return {prompt.prompt_key: prompt.prompt_ids for prompt in prompts}
    return contexts_of(bench, arm, prompts, demonstrations, side=1)


def draw_candidates(policy: Policy, plan: SamplingPlan, contexts: Contexts, n: int) -> list[Example]:
    """n candidates for each response of the plan: completion i * n + c of an example is candidate c of response i.

    Response i depends on the random numbers of response i alone, as in all other arms.
    """
    return draw_in_context(policy, plan, contexts, [plan.seed + STREAM * c for c in range(n)]).examples


def _sums(bench: Bench, policy: Policy, examples: Sequence[Example], read: Contexts) -> Tensor:
    """log pi(y | what the policy reads) of every completion, (P, K)."""
    return completion_logprob_sums(policy, with_prompts(examples, read), **bench.reading).double()


def _copies(candidates: Example, demonstrations: Sequence[Example]) -> list[bool]:
    """Whether each candidate is a copy of a response in its context."""

    def bare(example: Example, k: int) -> list[int]:
        return example.completions[k][: len(example.completions[k]) - int(example.ended[k])]

    shown = [bare(one, 0) for one in demonstrations]
    return [is_copy(bare(candidates, k), shown) for k in range(len(candidates.completions))]


def picked(candidates: Sequence[Example], chosen: Sequence[Sequence[int]]) -> Samples:
    """The chosen candidates, (P, A), as samples with their length and ended."""
    examples = []
    for example, places in zip(candidates, chosen, strict=True):
        n = len(example.completions) // len(places)
        kept = [i * n + place for i, place in enumerate(places)]
        ids, ended = [example.completions[k] for k in kept], [example.ended[k] for k in kept]
        examples.append(replace(example, completions=ids, ended=ended))
    samples = Samples(examples, [one.prompt_key for one in examples for _ in one.completions])
    samples.values["length"] = np.array([len(ids) for one in examples for ids in one.completions], dtype=np.float64)
    samples.values["ended"] = np.array([flag for one in examples for flag in one.ended], dtype=np.float64)
    return samples


def pairs_of_source(bench: Bench, arm: Resolved) -> Sequence[Example]:
    """The pairs of the arm's own source in the split of the results; none if it has demonstrations only."""
    split, most = bench.config.split, bench.config.max_prompts
    return _pool(bench, arm).data.split("pair", split, bench.tokenizer, limit=most, required=False)[0]


def pair_accuracy(bench: Bench, arm: Resolved, pairs: Sequence[Example]) -> dict[str, Estimate]:
    """Accuracy on held-out pairs of the contrast S, of log pi(y | x) alone, and of the bench's reward model.

    At most `max_prompts` pairs are read, and none that is longer than the prompts and responses of the results.
    """
    longest = max(len(prompt.prompt_ids) for prompt in bench.plan.prompts)
    read = [
        pair
        for pair in lowest_examples(pairs, bench.config.max_prompts)
        if len(pair.prompt_ids) <= longest and max(map(len, pair.completions)) <= bench.plan.response_length
    ]
    if not read:
        return {}
    policy = bench.policy(arm.policy)
    demonstrations = retrieved(bench, arm, _pool(bench, arm), read)
    mine = _sums(bench, policy, read, contexts_of(bench, arm, read, demonstrations))
    theirs = _sums(bench, policy, read, _against(bench, arm, read, demonstrations))
    plain = completion_logprob_sums(policy, read, **bench.reading)
    found = {arm.label: (mine - theirs).tolist(), f"{LOG_P}{arm.policy.label}": plain.tolist()}
    if bench.scorer is not None:
        at_once, memory = bench.plan.responses_at_once, bench.plan.memory
        scores = score(bench.scorer.score, read, responses_at_once=at_once, memory=memory)
        found[bench.scorer.label] = by_example(scores, read)
    clusters = [pair.prompt_key for pair in read]
    return {name: accuracy([one - other for one, other in rows], clusters) for name, rows in found.items()}
