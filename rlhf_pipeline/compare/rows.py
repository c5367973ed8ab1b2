"""One row of a comparison for each trained model: sampled figures with intervals, and the training cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlhf_pipeline.compare.aim import Aim, aim_of
from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.data.tokenizers import text_of
from rlhf_pipeline.evaluation.diversity import distinct, self_bleu, token_budget
from rlhf_pipeline.evaluation.sampled import Samples, paired_difference, scores_of, take_from_policy
from rlhf_pipeline.evaluation.win_rates import tie_share, win_rate
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.measure.best_of import primary_figure
from rlhf_pipeline.measure.evaluate import kept_samples, without_decoder
from rlhf_pipeline.registry.parents import algorithm_of, beta_of, parent_of, reward_models_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import Cost, Diversity, InContext, Interval, Row
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.stages.reward_sources import load_reward

COST_KEYS = ("wall_seconds", "flops", "tokens_trained", "tokens_generated", "optimizer_steps")


MOST_COMPARED = 8
"""The most samples of a prompt that self-BLEU compares; its cost grows with their square."""


@dataclass
class Measured:
    """A point, its model, and its samples on the test prompts and, if settings are chosen, on validation prompts."""

    point: Point
    model: Resolved
    test: Samples
    validation: Samples | None = None
    scorer: str | None = None  # the reward model of `score`
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # the baseline's scores by other reward models
    aim: Aim = field(default_factory=Aim)
    own: Measured | None = None  # the same point by samples of the policy itself, if a decoder has made `test`

    @property
    def sampled(self) -> Measured:
        """The same point by samples of the policy itself: those that its KL belongs to."""
        return self.own or self

    def scored_by(self, scorer: str | None) -> Samples:
        """The samples with the scores of another point's reward model, so that the two points can be compared."""
        if scorer not in self.scores:
            return self.test
        return replace(self.test, values={**self.test.values, "score": self.scores[scorer]})

    @property
    def name(self) -> str:
        return self.model.label

    def values(self, figure: str, split: str = "test") -> np.ndarray:
        """Mean of a figure over the samples of each prompt, (P,)."""
        samples = self.test if split == "test" else self.validation
        assert samples is not None, "only measured figures are requested"
        return samples.by_prompt(figure).mean(1)


def bill(registry: Registry, resolved: Resolved) -> Cost | None:
    """Training cost of a model: its own run and, for PPO, those of its reward models; shared stages are not counted.

    An SFT model that answers with demonstrations in its context trains nothing: 0. The cost of a snapshot is its run
    up to that step, plus the whole cost of its reward models. Counts and seconds are
    added; peak memory is that of the largest stage. None if the cost is not known: for a model outside the registry,
    and for a snapshot of an earlier release.
    """
    if resolved.method is not None and resolved.policy.stage == "sft":
        return Cost(**dict.fromkeys(Cost.model_fields, 0.0))
    cost = resolved.manifest.cost if resolved.manifest is not None else {}
    if resolved.step is not None:
        cost = cost.get("at_step", {}).get(str(resolved.step), {})
    if resolved.manifest is None or (resolved.step is not None and not cost):
        return None
    total = {key: float(cost.get(key, 0)) for key in COST_KEYS}
    peak = float(resolved.manifest.cost.get("peak_memory_bytes", 0))
    for model in reward_models_of(registry, resolved):
        part = bill(registry, model)
        if part is None:
            return None  # the cost of a reward model from outside the registry is not known
        total = {key: value + getattr(part, key) for key, value in total.items()}
        peak = max(peak, part.peak_memory_bytes)
    return Cost(**total, peak_memory_bytes=peak)


@dataclass
class Scorers:
    """The reward model that scores a point: the one in the config, else that of the PPO model of the same seed."""

    bench: Bench
    by_seed: Mapping[int | None, str]
    _loaded: dict[str, RewardSource] = field(default_factory=dict)

    @classmethod
    def of(cls, bench: Bench, points: Sequence[tuple[Point, Resolved]], asked_for: bool) -> Scorers:
        """Find the reward model of each seed in the manifests.

        Raises:
            MismatchError: a reward model has other files than the manifest says, or is on the hub.
        """
        found: dict[int | None, str] = {}
        for point, model in () if asked_for else points:
            parent = parent_of(bench.registry, model, "reward_model")
            if parent is not None:
                found.setdefault(point.seed, parent.label)
        return cls(bench, found)

    def get(self, seed: int | None) -> RewardSource | None:
        """The scorer of a seed; None without a reward model."""
        bench, label = self.bench, self.by_seed.get(seed)
        if label is None or bench.scorer is None or label == bench.scorer.label:
            return bench.scorer
        if label not in self._loaded:
            policy = bench.reference or bench.registry.resolve(label)
            self._loaded[label] = load_reward(
                bench.registry, label, bench.config, policy, bench.tokenizer, bench.device, say=bench.say
            ).scorer
        return self._loaded[label]


def measure_points(
    points: Sequence[tuple[Point, Resolved]], test: Bench, validation: Bench | None, scorers: Scorers
) -> list[Measured]:
    """Sample and score every model with the same plan: same prompts, same random numbers."""
    found = []
    for number, (point, model) in enumerate(points, start=1):
        found.append(_measured(point, model, test, validation, scorers.get(point.seed)))
        test.say(f"[{number}/{len(points)}] measured {model.label}")
    _score_by_all(next(one for one in found if one.point.step is None), scorers, [point for point, _ in points])
    return found


def _measured(
    point: Point, model: Resolved, test: Bench, validation: Bench | None, scorer: RewardSource | None
) -> Measured:
    """Sample and score a model. With a decoder its own samples are measured too, and give the figures `OF_POLICY`."""
    held = None if validation is None else kept_samples(validation, model, scorer)
    label, aim = None if scorer is None else scorer.label, aim_of(test.registry, model)
    found = Measured(point, model, kept_samples(test, model, scorer), held, label, aim=aim)
    if test.plan.decoding.is_plain:
        return found
    plain = None if validation is None else without_decoder(validation)
    own = _measured(point, model, without_decoder(test), plain, scorer)
    for samples, theirs in ((found.test, own.test), (found.validation, own.validation)):
        if samples is not None and theirs is not None:
            take_from_policy(samples, theirs)
    return replace(found, own=own)


def _score_by_all(measured: Measured, scorers: Scorers, points: Sequence[Point]) -> None:
    """Add the scores of a model's responses by the reward model of every seed of these points."""
    for seed in dict.fromkeys(point.seed for point in points):
        source = scorers.get(seed)
        if source is not None and source.label != measured.scorer:
            for one in (measured, *filter(None, [measured.own])):
                one.scores[source.label] = scores_of(one.test, source, scorers.bench.plan)


def measured_reference(start: Measured, points: Sequence[Point], scorers: Scorers) -> Measured | None:
    """Measure the reference on the same prompts, or return `start` if it is that model.

    None if there is no reference, or no reward model whose over-optimisation could be assessed.
    """
    bench, own = scorers.bench, start.model
    reference = bench.reference
    if reference is None or bench.scorer is None:
        return None
    if own.label == reference.label or (own.digest is not None and own.digest == reference.digest):
        return start
    bench.say(f"{reference.label} is also sampled: over-optimisation is a gain over the model that KL is measured to")
    point = Point(reference.label, None, {}, reference.label)
    found = _measured(point, reference, bench, None, bench.scorer)
    _score_by_all(found, scorers, points)
    return found


def row_of(registry: Registry, measured: Measured, baseline: Measured, diversity: Diversity | None = None) -> Row:
    """The row of one point; every row except the baseline's is compared with the baseline."""
    point, model, figures = measured.point, measured.model, measured.test
    row = Row(
        name=measured.name,
        arm=point.arm,
        seed=model.manifest.seed if point.seed is None and model.manifest is not None else point.seed,
        setting=dict(point.setting),
        step=point.step,
        model=model.label,
        stage=model.stage,
        digest=model.digest,
        algorithm=algorithm_of(model),
        beta=beta_of(model),
        effective_beta=measured.aim.effective_beta,
        optimum=measured.aim.optimum,
        moves_optimum=dict(measured.aim.moved),
        may_move_optimum=dict(measured.aim.may_move),
        scored_by=measured.scorer,
        metrics=Interval.table(figures.table()),
        per_prompt={name: measured.values(name).tolist() for name in figures.values},
        validation=None if measured.validation is None else Interval.table(measured.validation.table()),
        cost=bill(registry, model),
        diversity=diversity,
        in_context=None if figures.facts is None else InContext.model_validate(figures.facts),
    )
    primary = primary_figure(figures)
    if measured is baseline or primary is None:
        return row
    theirs = baseline.scored_by(measured.scorer)
    difference, spread = paired_difference(figures, theirs, primary), float(np.std(theirs.values[primary]))
    mine, other = figures.by_prompt(primary), theirs.by_prompt(primary)
    coupled = figures.coupled
    several = mine.shape[1] > 1 or not coupled  # one sample with the same random number on both sides is no win rate
    against = {
        "win_rate": Interval.of(win_rate(mine, other, coupled=coupled).estimate) if several else None,
        "ties": tie_share(mine, other, coupled=coupled) if several else None,
        "difference": Interval.of(difference),
        "gain_in_sd": difference.mean / spread if spread > 0 else None,
    }
    return row.model_copy(update=against)


def diversities(measured: Sequence[Measured], bench: Bench) -> list[Diversity]:
    """distinct-n over the number of tokens that all models have, and self-BLEU over the samples of a prompt."""
    responses = [[ids for example in one.test.examples for ids in example.completions] for one in measured]
    budget, found = token_budget(responses), []
    for one, mine in zip(measured, responses, strict=True):
        texts = [
            [text_of(bench.tokenizer, ids, skip_special_tokens=True) for ids in example.completions[:MOST_COMPARED]]
            for example in one.test.examples
        ]
        overlap = self_bleu(texts) if bench.plan.samples > 1 else None
        found.append(Diversity.model_validate({**distinct(mine, budget), "self_bleu": overlap}))
    return found
