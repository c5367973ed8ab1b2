"""Other parts of a report: responses to read, training curves, lineage and configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_pipeline.data.tokenizers import text_of
from rlhf_pipeline.evaluation.sampled import Samples
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.results import Ancestor, DataReport, Response, Shown
from rlhf_pipeline.report.sections.curves import PANELS
from rlhf_pipeline.training.run_directory import read_status

POINTS = 200
"""The most points of a curve that are kept."""


def shown_samples(bench: Bench, measured: Mapping[str, Samples], count: int) -> list[Shown]:
    """Responses of every model to the same few prompts, with their scores.

    They are the first responses to the first prompts: none are selected.
    """
    return [
        Shown(prompt=prompt, responses={name: [_response(bench, samples, i)] for name, samples in measured.items()})
        for i, prompt in enumerate(prompt_texts(bench)[:count])
    ]


def _response(bench: Bench, samples: Samples, number: int) -> Response:
    ids, ended = samples.examples[number].completions[0], samples.examples[number].ended[0]
    figures = ("true_reward", "score", "judge")
    scores = {key: float(samples.by_prompt(key)[number, 0]) for key in figures if key in samples.values}
    return Response(text=text_of(bench.tokenizer, ids[: len(ids) - int(ended)]), ended=bool(ended), **scores)


def prompt_texts(bench: Bench) -> list[str]:
    """The text of each prompt of an evaluation, in order."""
    return [prompt.prompt_text or text_of(bench.tokenizer, prompt.prompt_ids) for prompt in bench.plan.prompts]


def curves(registry: Registry, models: Sequence[Resolved]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """(step, value) of the metrics that are drawn, for every model whose run folder still exists."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    runs = _runs_by_model(registry)
    for model in models:
        path = runs.get(model.label)
        if path is None:
            continue
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(row)
            except ValueError:
                continue  # the last line of a killed process may be cut
            for name in PANELS:
                if isinstance(values.get(name), int | float):
                    lines.setdefault(name, []).append((values["step"], values[name]))
        found[model.label] = {name: _thinned(points) for name, points in lines.items()}
    return found


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [*points[: -1 : -(-len(points) // POINTS)], points[-1]]


def _runs_by_model(registry: Registry) -> dict[str, Path]:
    """metrics.jsonl of the finished run of each registered model."""
    found = {}
    for metrics in sorted((registry.home / "runs").glob("*/metrics.jsonl")):
        if model := read_status(metrics.parent).get("model"):
            found[model] = metrics
    return found


def lineage(registry: Registry, models: Sequence[Resolved]) -> list[Ancestor]:
    """Every model behind a comparison with its digest and its parents, ancestors last."""
    rows: dict[str, Ancestor] = {}
    waiting = list(models)
    while waiting:
        model = waiting.pop(0)
        if model.label in rows:
            continue
        manifest = model.manifest
        parents = dict(manifest.parents) if manifest is not None else {}
        if model.method is not None:
            parents = {"policy": model.policy.parent}
        rows[model.label] = Ancestor(
            model=model.label,
            digest=model.digest,
            stage=model.stage,
            seed=manifest.seed if manifest is not None else None,
            parents={role: parent.ref for role, parent in parents.items()},
            data=[DataReport(**entry.model_dump()) for entry in manifest.data] if manifest is not None else [],
        )
        waiting += [registry.resolve(parent.ref) for parent in parents.values() if parent.digest is not None]
    return list(rows.values())


def configs(models: Sequence[Resolved]) -> dict[str, str]:
    """The resolved config of each registered model, as YAML."""
    import yaml

    return {
        model.label: yaml.safe_dump(
            {key: value for key, value in model.manifest.config.items() if value is not None}, sort_keys=False
        )
        for model in models
        if model.manifest is not None and model.method is None
    }
