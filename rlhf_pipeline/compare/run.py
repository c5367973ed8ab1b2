"""Compare trained models on the same prompts with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from rlhf_pipeline.compare.contrasts import compare_arms
from rlhf_pipeline.compare.fairness import allowed_by, unexpected
from rlhf_pipeline.compare.human import human_judged
from rlhf_pipeline.compare.llm_judged import llm_judged
from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.compare.preference_quality import preference_quality
from rlhf_pipeline.compare.prepare import exact_bench, find_entrants, set_up_benches
from rlhf_pipeline.compare.readings import configs, curves, lineage, prompt_texts, shown_samples
from rlhf_pipeline.compare.rows import diversities, measure_points, measured_reference, row_of
from rlhf_pipeline.compare.verdict import verdict
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.disk.storage import replace_text, staging
from rlhf_pipeline.labelling.arena import read_arena
from rlhf_pipeline.measure.best_of import best_of_n_rows, enough_samples, primary_figure
from rlhf_pipeline.measure.demonstrations import demonstrations_of, describe
from rlhf_pipeline.measure.exact import exact_figures
from rlhf_pipeline.models.sharing import sharing_models
from rlhf_pipeline.registry.parents import reward_models_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import Gate
from rlhf_pipeline.report.results import Comparable, Findings, Results
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.training.tracking import console


def gates_of(models: Sequence[Resolved]) -> dict[str, Gate]:
    """The gate of every reward model among these models, by name; gates of another format are left out."""
    found = {}
    for model in models:
        with suppress(ValidationError):
            if model.manifest is not None and (gate := model.manifest.metrics.get("gate")) is not None:
                found[model.label] = Gate.model_validate(gate)
    return found


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
        ConfigError: the labelling project compares no two of the models; see `read_arena`.
        RunFailed: the home is not writable; checked before anything is sampled.
    """

    said: set[str] = set()  # several parts look up the same reference: print each message once

    def say(text: str) -> None:
        if not quiet and text not in said:
            console.print(text, markup=False)
        said.add(text)

    # 1. Models, and whether they can be compared; prompts, reference, scorers: the same for all.
    registry = Registry(home)
    entrants = find_entrants(config, registry, points, say)
    config, models, reference = entrants.config, entrants.models, entrants.reference
    labels = list(dict.fromkeys(model.label for model in models))
    arena = None if config.human is None else read_arena(home, config.human, labels)
    chat = None if config.llm_judge is None else ChatModel.of(config.llm_judge, home)
    if chat is not None:
        chat.probe()
    report = home / "reports" / config.name
    with staging(report if report.is_dir() else report.parent, config.name):
        pass  # a folder that cannot be written is found before hours of sampling, not after
    bench, validation, scorers = set_up_benches(entrants, say)

    # 2. Sample and score every model by the same plan.
    measured = measure_points(entrants.measured, bench, validation, scorers)
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
    tables = exact_bench(bench, entrants)
    exact = None if tables is None else exact_figures(tables, entrants.distinct, {}, config.best_of)
    shown = demonstrations_of(bench, reference, config.split)
    against = compare_arms(
        measured[-len(entrants.trained) :],
        start,
        primary,
        config.primary_contrast,
        registry,
        exact=exact,
        demonstrations=shown,
        reference=measured_reference(start, [point for point, _ in entrants.trained], scorers),
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
        gates=gates_of([*([entrants.judge] if entrants.judge is not None else []), *behind]),
        prompts=len(bench.plan.prompts),
        prompt_texts=prompt_texts(bench),
        samples=config.samples,
        split=config.split,
        validation_split=config.validation_split if validation is not None else None,
        temperature=config.temperature,
        decoding=config.decoding,
        response_length=bench.plan.response_length,
        seed=config.seed,
        seeds=sorted({point.seed for point, _ in entrants.trained if point.seed is not None}),
        resampled=list(resampled),
        data=bench.data,
        comparable=Comparable(
            ok=not unexpected(entrants.differences, allowed_by(config)),
            differences=entrants.differences,
            allowed=config.allow_mismatch,
        ),
        rows=[*rows, *best, *passed],
        exact=exact,
        preferences=preference_quality(bench, config, entrants.finals),
        data_changed=bench.data_changed,
        demonstrations=None if shown is None else describe(shown),
        llm_judge=None if chat is None else llm_judged(bench, config, chat, ended),
        human=None if arena is None else human_judged(bench, arena, chat),
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
