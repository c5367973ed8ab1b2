"""Win rates by a language model, and its agreement with the labels of held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from rlhf_pipeline.compare.preference_quality import held_out_pairs
from rlhf_pipeline.compare.rows import Measured
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.data.samples import lowest_hashes
from rlhf_pipeline.evaluation.preference_metrics import accuracy
from rlhf_pipeline.evaluation.seeds import infer
from rlhf_pipeline.evaluation.win_rates import ONE_SAMPLE
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.measure.training_loss import trained_by_dpo
from rlhf_pipeline.registry.parents import reward_models_of
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.results import JudgedPair, LabelAgreement, LlmFigures, LlmJudged
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.rollout.llm_judge import Comparison, PairVerdicts, compare_pairs
from rlhf_pipeline.rollout.texts import answers

NO_PAIRS = "no held-out labelled pairs are known for these models"
NOT_ASKED = "label_pairs is 0"


def llm_judged(bench: Bench, config: CompareConfig, chat: ChatModel, measured: Sequence[Measured]) -> LlmJudged:
    """Compare every final model with the first one, and arms with one setting each with each other.

    Raises:
        RunFailed: the endpoint does not answer.
    """
    judge = chat.config
    bench.say(f"{judge.label} at {judge.endpoint} compares responses, each pair in both orders")
    start, *others = measured
    pairs = [_pair(bench, chat, [(one, start)]) for one in others]
    arms: dict[str, list[Measured]] = {}
    for one in measured:
        arms.setdefault(one.point.arm, []).append(one)
    single = [arm for arm in arms.values() if len({str(one.point.setting) for one in arm}) == 1]
    for first, second in combinations(single, 2):
        by_seed = {one.point.seed: one for one in second}
        both = [(one, by_seed[one.point.seed]) for one in first if one.point.seed in by_seed]
        if both and start not in (*first, *second):
            pairs.append(_pair(bench, chat, both))
    labels, why_not = _agreement(bench, config, chat, measured) if judge.label_pairs else (None, NOT_ASKED)
    bench.say(f"{judge.label}: {chat.asked} answers of the endpoint, {chat.known} of the cache")
    return LlmJudged(
        judge=judge.label,
        endpoint=judge.endpoint,
        pairs_per_prompt=min(judge.pairs_per_prompt, bench.plan.samples),
        pairs=pairs,
        labels=labels,
        why_no_labels=why_not,
    )


def _comparisons(bench: Bench, one: Measured, other: Measured, each: int) -> list[Comparison]:
    """`each` comparisons for each prompt: response i with response i + 1 of the other side.

    Responses with equal numbers come from the same random numbers and would not be independent.
    """
    count = bench.plan.samples
    mine, theirs = (list(answers(side.test.examples, bench.tokenizer, rereading=True)) for side in (one, other))
    return [
        Comparison(mine[start + i].prompt, mine[start + i].response, theirs[start + (i + 1) % count].response)
        for start in range(0, len(mine), count)
        for i in range(each)
    ]


def _pair(bench: Bench, chat: ChatModel, both: Sequence[tuple[Measured, Measured]]) -> JudgedPair:
    """The win rate of the first side, over the seeds of both and the prompts."""
    names = [{side.point.arm for side in sides} for sides in zip(*both, strict=True)]
    several = len(both) > 1
    a, b = (next(iter(arm)) if several else side.name for arm, side in zip(names, both[0], strict=True))
    if bench.plan.samples < 2 and bench.plan.decoding.do_sample:
        return JudgedPair(
            a=a, b=b, estimate=None, why_not=ONE_SAMPLE, p=None, **dict(_figures(PairVerdicts([], None, 0.0, 0)))
        )
    each = min(chat.config.pairs_per_prompt, bench.plan.samples)
    comparisons = [pair for one, other in both for pair in _comparisons(bench, one, other, each)]
    found = compare_pairs(chat, comparisons)
    inference = infer(np.array(found.outcomes).reshape(len(both), -1, each).mean(-1), null=0.5, share=True)
    estimate = Interval.of(inference.estimate)
    return JudgedPair(a=a, b=b, estimate=estimate, why_not=None, p=inference.p, **dict(_figures(found)))


def _figures(found: PairVerdicts) -> LlmFigures:
    return LlmFigures(
        comparisons=len(found.outcomes),
        ties=found.ties if found.outcomes else None,
        first_place=found.first_place,
        disagreed=found.disagreed if found.outcomes else None,
        unreadable=found.unreadable,
    )


def _agreement(
    bench: Bench, config: CompareConfig, chat: ChatModel, measured: Sequence[Measured]
) -> tuple[LabelAgreement | None, str | None]:
    """The share of held-out pairs that the judge orders as labelled, a tie one half; else why there is none."""
    models = [one.model for one in measured if one.model.manifest is not None]
    rewards = [reward for model in models for reward in reward_models_of(bench.registry, model)]
    sources = [*filter(trained_by_dpo, models), *rewards]
    pairs = lowest_hashes(held_out_pairs(bench, config, sources), chat.config.label_pairs)
    if not pairs:
        return None, NO_PAIRS
    sides = [list(answers([pair], bench.tokenizer, rereading=True)) for pair in pairs]
    found = compare_pairs(chat, [Comparison(better.prompt, better.response, worse.response) for better, worse in sides])
    clusters = [pair.prompt_key for pair in pairs]
    right = Interval.of(accuracy([outcome - 0.5 for outcome in found.outcomes], clusters))
    return LabelAgreement(pairs=len(pairs), prompts=len(set(clusters)), accuracy=right, **dict(_figures(found))), None
