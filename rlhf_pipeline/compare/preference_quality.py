"""Explicit and implicit reward: how well reward models and DPO policies order the same held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import UnknownReference
from rlhf_pipeline.evaluation.preference_metrics import (
    accuracy,
    compare_scorers,
    longer_wins,
    preference_metrics,
    reliability_bins,
)
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.measure.icdpo import pair_accuracy, pairs_of_source
from rlhf_pipeline.measure.trained_on import owned_by
from rlhf_pipeline.measure.training_loss import dpo_config, dpo_policies, own_data, trained_by_dpo
from rlhf_pipeline.registry.parents import reward_models_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.results import Preferences, Scorer, ScorerTest
from rlhf_pipeline.rollout.scoring import by_example, score
from rlhf_pipeline.stages.common import find_model
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.stages.reward_sources import load_reward
from rlhf_pipeline.training.pairs import Criterion
from rlhf_pipeline.training.reference_cache import cached_logprobs, completion_logprob_sums

PAIRS = 4096
"""The most held-out pairs that are scored, taken in hash order."""

LONGER = "longer wins"
"""The scorer that prefers the longer response."""


def held_out_pairs(bench: Bench, config: CompareConfig, sources: Sequence[Resolved]) -> list[Example]:
    """The held-out pairs of the data that the first of these models was trained on."""
    for model in sources:
        if model.manifest is None:
            continue
        stage = "dpo" if model.manifest.stage == "dpo" else "train-rm"
        values = own_data(model)
        try:
            with owned_by(model, values, "do without figures on its held-out pairs"):
                trained = load_config(stage, None, extra=values).of(TrainingConfig)
                if isinstance(trained, DpoConfig) and trained.population:
                    continue
                data = StageData(trained, bench.registry.home, lambda _: None)
                found, _ = data.split("pair", config.split, bench.tokenizer, limit=PAIRS, required=False)
        except UnknownReference as error:  # the prompts came from another source
            bench.say(f"note: no held-out pairs: {error}")
            continue
        if found:
            bench.compare_data(model, data.sources("pair"))
            return list(found)
    return []


def _implicit(bench: Bench, model: Resolved, pairs: Sequence[Example]) -> list[float]:
    """Implicit reward of the chosen response, beta log(pi / pi_ref), minus that of the rejected one."""
    policy, frozen, key = dpo_policies(bench, model)
    ref_logprobs = cached_logprobs(frozen, pairs, bench.registry.home / "cache", key, **bench.reading).logprobs
    logprobs = completion_logprob_sums(policy, pairs, **bench.reading).double()
    lengths = torch.ones_like(logprobs)  # the rewards of losses with a reference are sums
    rewards = Criterion.of(dpo_config(model)).rewards(logprobs, ref_logprobs.double(), lengths)
    return (rewards[:, 0] - rewards[:, 1]).tolist()


def _explicit(bench: Bench, model: Resolved, pairs: Sequence[Example]) -> list[float]:
    """Score of the chosen response minus that of the rejected one."""
    policy, say = bench.reference or model, bench.say
    reward = load_reward(bench.registry, model.label, bench.config, policy, bench.tokenizer, bench.device, say=say)
    at_once, memory = bench.plan.responses_at_once, bench.plan.memory
    scores = score(reward.source.score, pairs, responses_at_once=at_once, memory=memory)
    return [chosen - rejected for chosen, rejected in by_example(scores, pairs)]


def preference_quality(
    bench: Bench, config: CompareConfig, trained: Sequence[tuple[Point, Resolved]]
) -> Preferences | None:
    """Accuracy and calibration of every reward model and, for the first seed, of every DPO policy; None without pairs.

    An arm of in-context DPO has the accuracy of its contrast, beside that of log p alone: see `pair_accuracy`.
    The test compares the first reward model with the first DPO policy on the same pairs.
    """
    known = [(point, model) for point, model in trained if model.manifest is not None]
    first_seed = min((point.seed for point, _ in known if point.seed is not None), default=None)
    policies = [m for point, m in known if trained_by_dpo(m) and point.seed in (None, first_seed)]
    policies = list({model.label: model for model in policies}.values())
    labels = [reward.label for _, model in known for reward in reward_models_of(bench.registry, model)]
    models = [find_model(bench.registry, label, "reward_model") for label in dict.fromkeys(labels)]
    arms = list({model.label: model for _, model in trained if model.method == "icdpo"}.values())
    pairs = held_out_pairs(bench, config, [*policies, *models])
    if not pairs and arms:
        pairs = list(pairs_of_source(bench, arms[0]))
    if not pairs:
        return None
    clusters = [pair.prompt_key for pair in pairs]
    differences = {model.label: _explicit(bench, model, pairs) for model in models}
    differences |= {model.label: _implicit(bench, model, pairs) for model in policies}
    differences[LONGER] = longer_wins(*zip(*(pair.completions for pair in pairs), strict=True))
    test = None
    if models and policies:
        one, other = models[0].label, policies[0].label
        test = ScorerTest(
            name=f"{one} (explicit) - {other} (implicit)",
            **compare_scorers(differences[one], differences[other], clusters),
        )
    scorers = {name: _scorer(name, values, clusters) for name, values in differences.items()}
    for arm in arms:
        for name, right in pair_accuracy(bench, arm, pairs).items():
            scorers.setdefault(name, _uncalibrated(Interval.of(right)))
    return Preferences(pairs=len(pairs), prompts=len(set(clusters)), scorers=scorers, test=test)


def _scorer(name: str, values: Sequence[float], clusters: Sequence[str]) -> Scorer:
    """Accuracy and calibration of a scorer; length has no calibration, since lengths are not log-odds."""
    right = Interval.of(accuracy(values, clusters))
    if name == LONGER:
        return _uncalibrated(right)
    metrics = preference_metrics(values, clusters)
    figures = {key: metrics[key] for key in ("ece", "nll", "brier")}
    return Scorer(accuracy=right, **figures, bins=reliability_bins(values, clusters))


def _uncalibrated(accuracy: Interval) -> Scorer:
    """A scorer whose differences are no log-odds."""
    return Scorer(accuracy=accuracy, ece=None, nll=None, brier=None, bins=[])
