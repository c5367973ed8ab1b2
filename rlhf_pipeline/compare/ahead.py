"""Measure what a comparison reads, in another process: the cache is filled from the end, while the comparison itself
measures from the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.compare.prepare import exact_bench, find_entrants, set_up_benches
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.disk.kept import Busy
from rlhf_pipeline.measure.evaluate import kept_samples, without_decoder
from rlhf_pipeline.measure.exact import kept_row, measured_exactly
from rlhf_pipeline.models.sharing import sharing_models
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.training.tracking import console


@sharing_models()
def measure_ahead(config: CompareConfig, home: Path, points: Sequence[Point] | None = None) -> None:
    """Make the measurements of a comparison, or of some of its points, that no other process makes, and keep them.

    What is kept is known by all that it depends on. If a point that is not there yet would change a measurement, the
    comparison makes it again.
    """
    say = partial(console.print, markup=False)
    found = find_entrants(config, Registry(home), points, say)
    bench, validation, scorers = set_up_benches(found, say)
    exact = exact_bench(bench, found)
    if exact is not None:
        for model, beta in reversed(measured_exactly(exact, found.distinct)):
            with suppress(Busy):
                kept_row(exact, model, beta, wait=False)
                say(f"measured {f'the optimum at beta {beta:g}' if model is None else model.label} exactly")
    benches = [bench] if validation is None else [bench, validation]
    if not config.decoding.is_plain:
        benches += map(without_decoder, benches)
    for point, model in reversed(found.measured):
        for one in benches:
            with suppress(Busy):
                kept_samples(one, model, scorers.get(point.seed), wait=False)
        say(f"measured {model.label}")
