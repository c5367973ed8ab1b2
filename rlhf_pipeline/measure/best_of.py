"""Best-of-n from the measured samples of a policy."""

from __future__ import annotations

from dataclasses import replace

from rlhf_pipeline.evaluation.best_of_n import best_of_n, kl_bound
from rlhf_pipeline.evaluation.sampled import OF_POLICY, SHARES, Samples, draw
from rlhf_pipeline.evaluation.statistics import cluster_mean
from rlhf_pipeline.measure.bench import Bench, add_rewards
from rlhf_pipeline.measure.in_context import measure_in_context
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.report.figures import BEST_OF_N, Interval, Row


def primary_figure(samples: Samples) -> str | None:
    """The figure that measures how good a response is: the true reward if it is known, else the judge's score."""
    return next((name for name in ("true_reward", "judge", "score") if name in samples.values), None)


def _chooser(bench: Bench, figure: str) -> str | None:
    source = {"score": bench.scorer, "judge": bench.judge}.get(figure)
    return bench.truth_label if source is None else source.label


def enough_samples(bench: Bench, baseline: Resolved, drawn: Samples, sizes: tuple[int, ...]) -> Samples:
    """The samples `drawn` from the baseline, or more samples of the baseline if best-of-n needs them."""
    needed = max(sizes, default=0)
    if needed <= bench.plan.samples:
        return drawn
    more = replace(bench, plan=replace(bench.plan, samples=needed))
    if baseline.method is not None:
        return measure_in_context(more, baseline)
    samples = draw(bench.policy(baseline), more.plan)
    add_rewards(more, samples)
    return samples


def best_of_n_rows(bench: Bench, baseline: Samples, label: str, sizes: tuple[int, ...]) -> list[Row]:
    """Best-of-n of the baseline: chosen by the reward model if there is one, measured by the true reward.

    The bound of its KL holds for the best of n samples of the policy itself: with a decoder there is none.
    """
    chooser_name = "score" if "score" in baseline.values else primary_figure(baseline)
    if chooser_name is None:
        return []
    keys = [example.prompt_key for example in baseline.examples]
    chooser = baseline.values[chooser_name].reshape(len(keys), -1)
    rows = []
    for n in sizes:
        figures = {}
        for name, values in baseline.values.items():
            if name in OF_POLICY:
                continue
            best = best_of_n(chooser, values.reshape(len(keys), -1), n)
            figures[name] = Interval.of(cluster_mean(best, keys, share=name in SHARES))
        rows.append(
            Row(
                name=f"best of {n} of {label}",
                model=label,
                stage=BEST_OF_N,
                n=n,
                samples=chooser.shape[1],
                chosen_by=_chooser(bench, chooser_name),
                metrics=figures,
                kl_bound=kl_bound(n) if bench.plan.decoding.is_plain else None,
                cost=None,
            )
        )
    return rows
