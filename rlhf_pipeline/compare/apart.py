"""Arms that differ in KL or in length, in sentences of the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import inf, isfinite

from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.results import Findings
from rlhf_pipeline.report.sides import Summary

APART = 2.0
"""Arms at one beta are far apart if their KLs differ by more than this factor and the intervals do not overlap."""
UNMOVED = 0.01
"""An arm whose KL to the reference is below this, in nats a response, has hardly moved: it writes what SFT writes."""
NOTABLE_LENGTH = 0.1
"""A difference in mean length is reported if it is above this share of the baseline's mean length."""
MOST_PAIRS = 2
"""The most pairs of arms that have a line each where they differ in length or in KL."""


def say_interval(estimate: Interval) -> str:
    """A mean with its interval; an end that is not 0 is not printed as 0."""
    low, high = estimate.ends or (-inf, inf)
    digits = next((n for n in (3, 4, 5) if all(round(end, n) for end in (low, high) if end and isfinite(end))), 6)
    return f"{estimate.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def unmoved(results: Findings) -> dict[str, float]:
    """The arms that have hardly moved from the reference at any setting, each with its largest KL."""
    largest: dict[str, float] = {}
    for entry in results.summary:
        if entry.beta is not None and "kl" in entry.metrics:
            kl = entry.metrics["kl"]
            largest[entry.arm] = max(largest.get(entry.arm, 0.0), kl.ends[1] if kl.ends else kl.mean)
    return {arm: kl for arm, kl in largest.items() if kl < UNMOVED}


def apart_in_kl(results: Findings) -> Iterator[str]:
    """Yield sentences on arms that one beta has taken to very different KLs: their differences also come from KL."""
    said: set[tuple[str, str]] = set()
    found: dict[float, list[tuple[Summary, Summary]]] = {}
    entries = [entry for entry in results.summary if entry.beta is not None and "kl" in entry.metrics]
    for one, other in combinations(entries, 2):
        near, far = sorted((one, other), key=lambda entry: entry.metrics["kl"].mean)
        low, high, arms = near.metrics["kl"], far.metrics["kl"], (one.arm, other.arm)
        if arms[0] == arms[1] or one.beta != other.beta or arms in said or low.ends is None or high.ends is None:
            continue
        if high.mean > max(APART * low.mean, UNMOVED) and high.ends[0] > low.ends[1] and one.beta is not None:
            said.add(arms)
            found.setdefault(one.beta, []).append((far, near))
    for beta, pairs in found.items():
        if len(pairs) > MOST_PAIRS:
            several = {entry.arm: [entry.metrics["kl"].mean] for pair in pairs for entry in pair}
            said_kls = (
                f"at the same beta, {beta:g}, the KLs of {len(pairs)} pairs of arms differ by more than a factor of "
            )
            yield f"{said_kls}{APART:g}: {_by_arm(several)} nats; part of their differences may come from this distance"
            continue
        for far, near in pairs:
            ends = [entry.metrics["kl"] for entry in (far, near)]
            figures = " against ".join(f"{kl.mean:.3g} [{kl.low:.3g}, {kl.high:.3g}]" for kl in ends)
            text = f"at the same beta, {beta:g}, {far.arm} is much farther from the reference than {near.arm}"
            text += f": KL {figures} nats; part of their difference may come from this distance"
            yield text


def _by_arm(values: Mapping[str, Sequence[float]]) -> str:
    """A figure of each arm, the largest first: `ppo 3, dpo 1.5 to 2`; a range if it has several settings."""
    ends = {arm: (min(found), max(found)) for arm, found in values.items()}
    told = [
        f"{arm} {low:.3g}" if low == high else f"{arm} {low:.3g} to {high:.3g}"
        for arm, (low, high) in sorted(ends.items(), key=lambda one: -one[1][1])
    ]
    return ", ".join(told)


def apart_in_length(results: Findings) -> Iterator[str]:
    """Yield sentences on arms whose responses differ in length, of many pairs of arms one with the mean lengths."""
    base = next((row.metrics["length"].mean for row in results.rows if "length" in row.metrics), None)
    found = [
        (contrast, estimate)
        for contrast in results.find(figure="length")
        if (estimate := contrast.estimate)
        and base
        and estimate.excludes()
        and abs(estimate.mean) > NOTABLE_LENGTH * base
    ]
    if len(found) > MOST_PAIRS:
        lengths: dict[str, list[float]] = {}
        for entry in results.summary:
            if "length" in entry.metrics:
                lengths.setdefault(entry.arm, []).append(entry.metrics["length"].mean)
        text = (
            f"mean lengths of responses in tokens: {_by_arm(lengths)}; {len(found)} contrasts of two arms are certain "
        )
        yield f"{text}and above {NOTABLE_LENGTH:.0%} of the baseline's length: see the length-controlled win rates"
        return
    for contrast, estimate in found:
        longer = contrast.a if estimate.mean > 0 else contrast.b
        text = f"{longer} writes longer responses {contrast.at} ({say_interval(estimate)} tokens)"
        yield f"{text}: see the length-controlled win rate"
