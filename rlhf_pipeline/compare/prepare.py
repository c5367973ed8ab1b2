"""What a comparison needs before it measures: models that can be compared, and what they are measured with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_pipeline.compare.fairness import (
    allowed_by,
    differences_by_seed,
    judge_overlap,
    require_comparable,
    truth_overlap,
    unexpected,
)
from rlhf_pipeline.compare.points import Point, with_snapshots
from rlhf_pipeline.compare.rows import Scorers
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.errors import ConfigError, DataError, Fault
from rlhf_pipeline.measure.bench import Bench, find_policies, knows_data, scored_as_trained, set_up
from rlhf_pipeline.measure.exact import ExactBench
from rlhf_pipeline.measure.leaves import TRUTH, Leaves
from rlhf_pipeline.models.memory import MEASURING_ADVICE, Memory
from rlhf_pipeline.registry.parents import beta_of, parent_of, reference_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.results import Difference
from rlhf_pipeline.stages.common import find_model
from rlhf_pipeline.training.accelerator import make_accelerator

Entry = tuple[Point, Resolved]
"""A point of an arm, with its model."""


@dataclass(frozen=True)
class Entrants:
    """The models of a comparison.

    config: with the reward model that they were trained on. trained: all points; finals: those that are no snapshots.
    models: the baseline, then the final models. differences: between the arms, besides the way they were trained.
    """

    registry: Registry
    config: CompareConfig
    trained: list[Entry]
    finals: list[Entry]
    baseline: Resolved | None
    reference: Resolved | None
    judge: Resolved | None
    differences: list[Difference]
    asked_for: bool  # whether the user's config names the reward model

    @property
    def models(self) -> list[Resolved]:
        return [*([] if self.baseline is None else [self.baseline]), *(model for _, model in self.finals)]

    @property
    def distinct(self) -> list[Resolved]:
        """The baseline and the final models, each once, without arms with demonstrations in their context."""
        return list({model.label: model for model in self.models if model.method is None}.values())

    @property
    def measured(self) -> list[Entry]:
        """All points that are sampled, that of the baseline first."""
        one = self.baseline
        return [*([] if one is None else [(Point(one.label, None, {}, one.label), one)]), *self.trained]


def find_entrants(
    config: CompareConfig, registry: Registry, points: Sequence[Point] | None, say: Callable[[str], None]
) -> Entrants:
    """Find the models of a comparison and check that they can be compared.

    Args:
        points: see `compared`.

    Raises:
        MismatchError: the arms differ in more than the way they were trained, and `allow_mismatch` is not set.
    """
    trained = _find_points(registry, config, points, say)
    finals = [(point, model) for point, model in trained if point.step is None]
    if config.snapshots:
        say(f"{len(trained) - len(finals)} snapshots of {len(finals)} models are added to the curves")
    differences = differences_by_seed(registry, [(point.arm, point.seed, model) for point, model in finals])
    final_models = [model for _, model in finals]
    judge, truth = (
        find_model(registry, text, "reward_model") if text and names_a_model(text) else None
        for text in (config.judge, config.true_reward)
    )
    differences += judge_overlap(registry, judge, final_models)
    differences += truth_overlap(registry, truth, final_models)
    if not config.allow_mismatch:
        require_comparable(unexpected(differences, allowed_by(config)))
    for difference in differences:
        say(f"note: the arms differ in {difference}")
    baseline = find_policies(registry, [config.baseline], say)[0] if config.baseline else None
    reference = _reference(registry, config, final_models, baseline, say)
    scored = scored_as_trained(config, registry, [*([] if baseline is None else [baseline]), *final_models])
    asked_for = config.reward_model is not None
    return Entrants(registry, scored, trained, finals, baseline, reference, judge, differences, asked_for)


def _find_points(
    registry: Registry, config: CompareConfig, points: Sequence[Point] | None, say: Callable[[str], None]
) -> list[Entry]:
    """The points with their models; without an experiment every reference is an arm with one model."""
    found: dict[str, Resolved] = {}
    if points is None:
        found = {model.label: model for model in find_policies(registry, list(config.arms), say)}
        arms = [with_snapshots(Point(label, None, {}, label), one, config.snapshots) for label, one in found.items()]
        points = [point for arm in arms for point in arm]
    for point in points:
        if point.model not in found:
            found[point.model] = find_policies(registry, [point.model], say)[0]
    return [(point, found[point.model]) for point in points]


def _reference(
    registry: Registry,
    config: CompareConfig,
    arms: Sequence[Resolved],
    baseline: Resolved | None,
    say: Callable[[str], None],
) -> Resolved | None:
    """The model that KL is measured to: `reference` of the config, else the first reference of an arm, else the
    baseline, else the first arm's SFT model."""
    if config.reference:
        return find_policies(registry, [config.reference], say)[0]
    against = {arm.label: parent_of(registry, arm, "reference") for arm in arms}
    known = [found for found in against.values() if found is not None]
    reference = known[0] if known else baseline.policy if baseline else reference_of(registry, arms[0])
    for label, found in against.items():
        if reference is not None and found is not None and found.digest != reference.digest:
            say(f"note: {label} was trained with {found.label}; KL is measured to {reference.label} for all")
    return reference


def set_up_benches(found: Entrants, say: Callable[[str], None]) -> tuple[Bench, Bench | None, Scorers]:
    """What the models are measured with: the same prompts and scorers for all.

    Returns:
        The bench of the test prompts, that of the validation prompts if settings are chosen, and the scorers.

    Raises:
        ConfigError: there is no split to choose settings on.
    """
    registry, config, models = found.registry, found.config, found.models
    # The first arm with known data; the data of the baseline (the SFT model) may be of another kind.
    example = next(filter(knows_data, (model for _, model in found.finals)), models[0])
    memory = Memory(say, advice=MEASURING_ADVICE)
    device = make_accelerator(config).device
    plan = functools.partial(
        set_up,
        reference=found.reference,
        samples=config.samples,
        seed=config.seed,
        memory=memory,
        models=models,
    )
    bench = plan(registry, config, example, device, say=say)
    kinds = {(point.arm, str(point.setting), point.step) for point, _ in found.trained}
    swept = len(kinds) > len({arm for arm, *_ in kinds})  # one setting with snapshots has a curve too
    validation = None
    if swept and config.validation_split and config.prompts is None:
        held = config.model_copy(update={"split": config.validation_split})
        try:
            validation = plan(registry, held, example, device, say=say)
        except DataError as error:
            advice = "a split of the prompts for choosing settings, or null to choose no setting"
            raise ConfigError(Fault("validation_split", str(error), advice)) from None
    return bench, validation, Scorers.of(bench, found.measured, found.asked_for)


def exact_bench(bench: Bench, found: Entrants) -> ExactBench | None:
    """What exact figures are computed with, if every response can be listed and a beta is known."""
    config, registry = found.config, found.registry
    betas = [beta for model in found.models if (beta := beta_of(model)) is not None]
    if not (config.exact and bench.knows_truth and bench.reference is not None and betas):
        return None
    learned = config.reward_model if config.reward_model and names_a_model(config.reward_model) else None
    by_seed = {
        point.seed: parent.label
        for point, model in found.finals
        if (parent := parent_of(registry, model, "reward_model")) is not None
    }
    return ExactBench(
        Leaves.of(bench),
        TRUTH,
        None,
        usual_beta=betas[0],
        reward_model=learned,
        few=config.reward_model_prompts,
        reward_models={model.label: by_seed[point.seed] for point, model in found.finals if point.seed in by_seed},
    )
