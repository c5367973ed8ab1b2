"""Compare trained models on the same prompts with the same random numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from rlhf_pipeline.compare.contrasts import compare_arms
from rlhf_pipeline.compare.fairness import (
    differences_by_seed,
    judge_overlap,
    require_comparable,
    truth_overlap,
)
from rlhf_pipeline.compare.llm_judged import llm_judged
from rlhf_pipeline.compare.points import Point, with_snapshots
from rlhf_pipeline.compare.preference_quality import preference_quality
from rlhf_pipeline.compare.readings import configs, curves, lineage, prompt_texts, shown_samples
from rlhf_pipeline.compare.rows import Scorers, diversities, measure_points, measured_reference, row_of
from rlhf_pipeline.compare.verdict import verdict
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.disk.storage import replace_text, staging
from rlhf_pipeline.errors import ConfigError, DataError, Fault
from rlhf_pipeline.measure.bench import Bench, find_policies, knows_data, scored_as_trained, set_up
from rlhf_pipeline.measure.best_of import best_of_n_rows, enough_samples, primary_figure
from rlhf_pipeline.measure.demonstrations import demonstrations_of, describe
from rlhf_pipeline.measure.exact import ExactBench, exact_figures
from rlhf_pipeline.measure.leaves import TRUTH, Leaves
from rlhf_pipeline.models.memory import MEASURING_ADVICE, Memory
from rlhf_pipeline.models.sharing import sharing_models
from rlhf_pipeline.registry.parents import beta_of, parent_of, reference_of, reward_models_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import Exact, Gate
from rlhf_pipeline.report.results import Comparable, Findings, Results
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.stages.common import find_model
from rlhf_pipeline.training.open_run import make_accelerator
from rlhf_pipeline.training.tracking import console


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
    reference = known[0] if known else baseline or reference_of(registry, arms[0])
    for label, found in against.items():
        if reference is not None and found is not None and found.digest != reference.digest:
            say(f"note: {label} was trained with {found.label}; KL is measured to {reference.label} for all")
    return reference


def gates_of(models: Sequence[Resolved]) -> dict[str, Gate]:
    """The gate of every reward model among these models, by name; gates of another format are left out."""
    found = {}
    for model in models:
        with suppress(ValidationError):
            if model.manifest is not None and (gate := model.manifest.metrics.get("gate")) is not None:
                found[model.label] = Gate.model_validate(gate)
    return found


def _exact(
    bench: Bench, config: CompareConfig, models: Sequence[Resolved], trained: Sequence[tuple[Point, Resolved]]
) -> Exact | None:
    """Exact figures of the models, if every response can be listed and a beta is known."""
    betas = [beta for model in models if (beta := beta_of(model)) is not None]
    if not (config.exact and bench.knows_truth and bench.reference is not None and betas):
        return None
    learned = config.reward_model if config.reward_model and names_a_model(config.reward_model) else None
    leaves = Leaves.of(bench)
    by_seed = {
        point.seed: found.label
        for point, model in trained
        if (found := parent_of(bench.registry, model, "reward_model")) is not None
    }
    judge = ExactBench(
        leaves,
        TRUTH,
        None,
        usual_beta=betas[0],
        reward_model=learned,
        few=config.reward_model_prompts,
        reward_models={model.label: by_seed[point.seed] for point, model in trained if point.seed in by_seed},
    )
    return exact_figures(judge, models, {}, config.best_of)


def _find_points(
    registry: Registry, config: CompareConfig, points: Sequence[Point] | None, say: Callable[[str], None]
) -> list[tuple[Point, Resolved]]:
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


def run_compare(config: CompareConfig, home: Path, **options) -> Results:
    """Compare arms with `compared` (same options) and write reports/<name>/results.json and index.html."""
    results = compared(config, home, **options)
    replace_text(Path(results.path), results.text())  # checked first: the report needs it
    from rlhf_pipeline.report import write_report

    write_report(results, Path(results.report).parent)
    return results


@sharing_models()
def compared(
    config: CompareConfig,
    home: Path,
    *,
    quiet: bool = False,
    points: Sequence[Point] | None = None,
    resampled: Sequence[str] = (),
    command: str | None = None,
) -> Results:
    """Compare arms with a baseline and return the content of results.json; writes no report.

    Args:
        points: every trained model of every arm, from an experiment; without them the arms are the references of
            the config. resampled: stages that every seed runs again. command: the command that reproduces this.

    Raises:
        MismatchError: the arms differ in more than the way they were trained, and `allow_mismatch` is not set.
        RunFailed: the home is not writable; checked before anything is sampled.
    """

    said: set[str] = set()  # several parts look up the same reference: print each message once

    def say(text: str) -> None:
        if not quiet and text not in said:
            console.print(text, markup=False)
        said.add(text)

    # 1. Models, and whether they can be compared; prompts, reference, scorers: the same for all.
    registry = Registry(home)
    device = make_accelerator(config).device
    trained = _find_points(registry, config, points, say)
    finals = [(point, model) for point, model in trained if point.step is None]
    if config.snapshots:
        say(f"{len(trained) - len(finals)} snapshots of {len(finals)} models are added to the curves")
    found_differences = differences_by_seed(registry, [(point.arm, point.seed, model) for point, model in finals])
    final_models = [model for _, model in finals]
    judge, truth = (
        find_model(registry, text, "reward_model") if text and names_a_model(text) else None
        for text in (config.judge, config.true_reward)
    )
    found_differences += judge_overlap(registry, judge, final_models)
    found_differences += truth_overlap(registry, truth, final_models)
    if not config.allow_mismatch:
        require_comparable(found_differences)
    for difference in found_differences:
        say(f"note: the arms differ in {difference}")
    baseline = find_policies(registry, [config.baseline], say)[0] if config.baseline else None
    models = ([baseline] if baseline is not None else []) + final_models
    reference = _reference(registry, config, final_models, baseline, say)
    asked_for = config.reward_model is not None
    config = scored_as_trained(config, registry, models)
    chat = None if config.llm_judge is None else ChatModel.of(config.llm_judge, home)
    if chat is not None:
        chat.probe()
    report = home / "reports" / config.name
    with staging(report if report.is_dir() else report.parent, config.name):
        pass  # a folder that cannot be written is found before hours of sampling, not after
    # The first arm with known data; the data of the baseline (the SFT model) may be of another kind.
    example = next(filter(knows_data, final_models), models[0])
    memory = Memory(say, advice=MEASURING_ADVICE)
    plan = functools.partial(
        set_up,
        reference=reference,
        samples=config.samples,
        seed=config.seed,
        memory=memory,
        models=models,
    )
    bench = plan(registry, config, example, device, say=say)
    kinds = {(point.arm, str(point.setting), point.step) for point, _ in trained}
    swept = len(kinds) > len({arm for arm, *_ in kinds})  # one setting with snapshots has a curve too
    validation = None
    if swept and config.validation_split and config.prompts is None:
        held = config.model_copy(update={"split": config.validation_split})
        try:
            validation = plan(registry, held, example, device, say=say)
        except DataError as error:
            advice = "a split of the prompts for choosing settings, or null to choose no setting"
            raise ConfigError(Fault("validation_split", str(error), advice)) from None

    # 2. Sample and score every model by the same plan.
    first = [(Point(models[0].label, None, {}, models[0].label), models[0])] if baseline is not None else []
    scorers = Scorers.of(bench, [*first, *trained], asked_for)
    measured = measure_points([*first, *trained], bench, validation, scorers)
    ended = [one for one in measured if one.point.step is None]
    start = ended[0]  # the baseline, else the first arm's first model
    rows = [row_of(registry, one, start, found) for one, found in zip(ended, diversities(ended, bench), strict=True)]
    passed = [row_of(registry, one, start) for one in measured if one.point.step is not None]
    best = best_of_n_rows(
        bench, enough_samples(bench, start.model, start.test, config.best_of), start.name, config.best_of
    )
    primary = primary_figure(start.test)

    # 3. Contrasts, rankings and the verdict.
    known = [one for model in models for one in (model, *reward_models_of(registry, model))]
    behind = list({one.label: one for one in known}.values())
    exact = _exact(bench, config, list({model.label: model for model in models}.values()), finals)
    shown = demonstrations_of(bench, reference, config.split)
    against = compare_arms(
        measured[len(first) :],
        start,
        primary,
        config.primary_contrast,
        registry,
        exact=exact,
        demonstrations=shown,
        reference=measured_reference(start, [point for point, _ in trained], scorers),
    )
    findings = Findings(
        name=config.name,
        command=command,
        primary=primary,
        baseline=models[0].label,
        reference=reference.label if reference is not None else None,
        reward_model=bench.scorer.label if bench.scorer is not None else None,
        judge=bench.judge.label if bench.judge is not None else None,
        true_reward=bench.truth_label,
        gates=gates_of([*([judge] if judge is not None else []), *behind]),
        prompts=len(bench.plan.prompts),
        prompt_texts=prompt_texts(bench),
        samples=config.samples,
        split=config.split,
        validation_split=config.validation_split if validation is not None else None,
        temperature=config.temperature,
        response_length=bench.plan.response_length,
        seed=config.seed,
        seeds=sorted({point.seed for point, _ in trained if point.seed is not None}),
        resampled=list(resampled),
        data=bench.data,
        comparable=Comparable(ok=not found_differences, differences=found_differences, allowed=config.allow_mismatch),
        rows=[*rows, *best, *passed],
        exact=exact,
        preferences=preference_quality(bench, config, finals),
        data_changed=bench.data_changed,
        demonstrations=None if shown is None else describe(shown),
        llm_judge=None if chat is None else llm_judged(bench, config, chat, ended),
        **dict(against),
    )
    return Results(
        **dict(findings),
        verdict=verdict(findings),
        samples_shown=shown_samples(bench, {one.name: one.test for one in ended}, config.shown_prompts),
        curves=curves(registry, behind),
        lineage=lineage(registry, models),
        configs=configs(models),
        path=str(report / "results.json"),
        report=str(report / "index.html"),
    )
