"""`few_shot:REF`: a policy that reads the same demonstrations before every prompt, without training.

It is the "prompted" baseline of Ouyang et al. 2022, section 3.5. Rewards, judges and the reference of the KL read the
prompt alone:

    KL = E_y sum_t KL(pi(. | d, x, y_<t) || pi_ref(. | x, y_<t)),  y ~ pi(. | d, x)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf_pipeline.data.examples import Example, pick, prompt_keys
from rlhf_pipeline.data.samples import lowest_examples
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.evaluation.sampled import Samples, add_kl, scores_of, with_prompts
from rlhf_pipeline.measure.bench import Bench, add_rewards
from rlhf_pipeline.measure.contexts import (
    Pool,
    add_tokens,
    contexts_of,
    draw_in_context,
    one_per_prompt,
    pool_of,
    settings_of,
)
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.training.reference_cache import completion_logprob_sums

CHOOSING = 64
"""Responses, or demonstrations, of the validation split by which a set of demonstrations is chosen."""


def few_shot(bench: Bench, arm: Resolved, scorer: RewardSource | None = None) -> Samples:
    """Sample the policy behind the best set of demonstrations; see `measure_in_context`."""
    policy, pool = bench.policy(arm.policy), pool_of(bench, arm)
    settings = settings_of(bench.config)
    scorer = scorer or bench.scorer
    sets = draw_sets(pool.examples, settings.demonstrations, settings.prefixes, bench.plan.seed)
    figures = figures_of_sets(bench, arm, policy, pool, sets, scorer)
    chosen = int(np.argmax(figures))
    contexts = contexts_of(bench, arm, bench.plan.prompts, [sets[chosen]] * len(bench.plan.prompts))
    samples = draw_in_context(policy, bench.plan, contexts)
    add_rewards(bench, samples, scorer)
    reference = bench.reference_policy()
    if reference is not None:
        add_kl(samples, policy, reference, bench.plan, contexts)
    add_tokens(samples, contexts)
    samples.facts = {
        "method": arm.method,
        "source": pool.source,
        "demonstrations": settings.demonstrations,
        "pool": len(pool.examples),
        "chosen": chosen,
        "prefixes": figures,
        "chosen_by": "likelihood" if scorer is None else scorer.label,
    }
    return samples


def draw_sets(examples: Sequence[Example], size: int, count: int, seed: int) -> list[list[Example]]:
    """`count` sets of `size` different demonstrations each, drawn by the seed."""
    generator = np.random.default_rng(seed)
    return [[examples[place] for place in generator.choice(len(examples), size, replace=False)] for _ in range(count)]


def figures_of_sets(
    bench: Bench,
    arm: Resolved,
    policy: Policy,
    pool: Pool,
    sets: Sequence[Sequence[Example]],
    scorer: RewardSource | None,
) -> list[float]:
    """The mean figure of each set of demonstrations on validation prompts, none of them a prompt of the results.

    The figure is the score of sampled responses; without a scorer, log pi(y | d, x) of validation demonstrations y.

    Raises:
        ConfigError: the source has no demonstrations in the validation split.
    """
    split, plan = settings_of(bench.config).validation_split, bench.plan
    found, _ = pool.data.split("demonstration", split, bench.tokenizer, required=False)
    # Of another source of prompts, nothing says which split its prompts have.
    asked = set() if bench.config.prompts is None else {prompt.prompt_key for prompt in plan.prompts}
    found = pick(found, [place for place, key in enumerate(prompt_keys(found)) if key not in asked])
    longest = max(len(prompt.prompt_ids) for prompt in plan.prompts)
    chosen = lowest_examples(found if scorer is None else one_per_prompt(found), CHOOSING)
    read = [one for one in chosen if len(one.prompt_ids) <= longest]
    if not read:
        what = f"{pool.source} has no demonstrations in the split {split!r}, on which a set of them is chosen"
        raise ConfigError(Fault("in_context.validation_split", what, "a split with demonstrations"))
    held = replace(plan, prompts=read, samples=max(1, CHOOSING // len(read)))
    figures = []
    for demonstrations in sets:
        contexts = contexts_of(bench, arm, read, [demonstrations] * len(read))
        if scorer is None:
            values = completion_logprob_sums(policy, with_prompts(read, contexts), **bench.reading).double().numpy()
        else:
            values = scores_of(draw_in_context(policy, held, contexts), scorer, held)
        figures.append(float(values.mean()))
    return figures
