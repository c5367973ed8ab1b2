"""The verdict in words on what people prefer, and on which scorers share their verdicts."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_pipeline.evaluation.seeds import holm
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.results import Line
from rlhf_pipeline.report.sides import HumanAgreement, HumanJudged, HumanPair

TOPIC = "human"
MOST_PAIRS = 6
"""Of more pairs of models only those that people tell apart have a line each."""


def by_people(human: HumanJudged) -> Iterator[Line]:
    """Yield a line for each pair of models and for each scorer; p-values of pairs are corrected by Holm's method."""
    said = [_pair(pair, p) for pair, p in zip(human.pairs, holm([pair.p for pair in human.pairs]), strict=True)]
    if len(said) > MOST_PAIRS:
        certain = [one for one in said if one.certain]
        text = f"people tell apart {len(certain)} of {len(said)} pairs of models; the table has every interval"
        said = [Line(topic=TOPIC, text=text, certain=bool(certain)), *certain]
    yield from said
    yield from map(_agreement, human.agreement)


def _pair(pair: HumanPair, p: float | None) -> Line:
    if pair.estimate is None:
        return Line(topic=TOPIC, text=f"cannot tell {pair.a} from {pair.b}: {pair.why_not}", certain=False)
    by = f"{pair.labelers} labelers" if pair.labelers > 1 else "one labeler, which says nothing about others"
    shown = f"win rate {_share(pair.estimate)}, {pair.comparisons} comparisons by {by}"
    if not pair.estimate.excludes(0.5):
        return Line(topic=TOPIC, text=f"people: cannot tell {pair.a} from {pair.b}: {shown}", certain=False)
    ahead, behind = (pair.a, pair.b) if pair.estimate.mean > 0.5 else (pair.b, pair.a)
    text, certain = f"people prefer {ahead} to {behind}: {pair.a} has the {shown}", p is None or p <= 0.05
    if not certain:
        text += f"; not significant after the correction for several pairs (Holm p = {p:.2f})"
    return Line(topic=TOPIC, text=text, certain=certain)


def _agreement(one: HumanAgreement) -> Line:
    better = one.share.excludes(0.5) and one.share.mean > 0.5
    than = "more often than a coin" if better else "maybe no more often than a coin"
    text = f"{one.judge} shares {_share(one.share)} of people's {one.comparisons} verdicts with a winner, {than}"
    return Line(topic=TOPIC, text=text, certain=better)


def _share(estimate: Interval) -> str:
    low, high = estimate.ends or (0.0, 1.0)
    return f"{estimate.mean:.2f} [{low:.2f}, {high:.2f}]"
