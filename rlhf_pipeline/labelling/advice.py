"""Findings on labels in words: what is wrong with them, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_pipeline.labelling.biases import FASTEST
from rlhf_pipeline.labelling.figures import Quality
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.text import number, percent, plural, words

USUAL_AGREEMENT = 0.70
"""InstructGPT's labelers agreed on 73 % and 77 % of pairs (Ouyang et al. 2022, section 3.4)."""

TENTATIVE = 0.667
"""The least alpha for tentative conclusions (Krippendorff 2004, p. 241)."""

STEADY = 0.75
ORDERLY = 0.90
SHORTCUT = 0.60
MANY = 0.10
"""A share of skipped or hurried items above this is reported."""


def findings(found: Quality) -> list[str]:
    """Sentences on what is wrong, the most serious first; empty if nothing is.

    A share is reported where its whole interval is on the wrong side of a threshold, so that few labels raise no alarm.
    """
    if not found.judgements:
        return ["no item has been labelled yet: send the labelers the address that `rlhf label serve` prints"]
    return [*_agreement(found), *_labelers(found), *_biases(found), *_times(found)]


def _said(found: Interval) -> str:
    return percent(found.mean, 0) + (
        "" if found.ends is None else f" (95 % interval {percent(found.low, 0)} to {percent(found.high, 0)})"
    )


def _below(found: Interval | None, threshold: float) -> bool:
    return found is not None and found.ends is not None and found.ends[1] < threshold


def _agreement(found: Quality) -> Iterator[str]:
    agreement = found.agreement
    if agreement is None:
        yield (
            "no pair of responses was ordered by two labelers, so nothing is known of their agreement: make the next "
            "project with overlap 3, or a small one beside this"
        )
    elif not agreement.excludes(0.5):
        yield (
            f"labelers agree on {_said(agreement)} of pairs, which a coin may reach: if more labels do not help, "
            "the responses do not differ in what is asked for, or the instructions do not say what counts"
        )
    elif agreement.mean < 0.5 or _below(agreement, USUAL_AGREEMENT):
        yield (
            f"labelers agree on {_said(agreement)} of pairs (InstructGPT's labelers: 73 to 77 %): discuss the items "
            "they disagree on, make the instructions clearer, and label some of them again"
        )
    for row in found.alphas:
        if row.what != "ranks" and row.alpha is not None and _below(row.alpha, TENTATIVE):
            what = "ratings" if row.what == "ratings" else f"the flag {row.what}"
            yield (
                f"{what}: alpha is {number(row.alpha.mean)}, below "
                f"{TENTATIVE} with its whole interval: define each answer by examples in the instructions, and do not "
                "train on these answers before"
            )
    if _below(found.consistency, STEADY):
        assert found.consistency is not None
        yield (
            f"labelers repeat {_said(found.consistency)} of their own verdicts: the choice is hard or hasty; allow "
            "ties, ask for fewer responses per item, or make shorter sessions"
        )


def _labelers(found: Quality) -> Iterator[str]:
    for one in found.labelers:
        name = f"labeler {one.labeler}"
        if _below(one.right, 0.5) or (one.right is None and _below(one.agreement, 0.5)):
            yield f"{name} is more often wrong than right: ask whether rank 1 is the best; leave these labels out"
        elif one.right is not None and one.right.ends is not None and one.right.ends[0] <= 0.5:
            yield (
                f"{name}: {_said(one.right)} of labels are right, which cannot be told from guessing: look at some of "
                "the judgements together, and leave the labels out if that confirms it"
            )
        if _below(one.consistency, STEADY) and not _below(found.consistency, STEADY):
            yield f"{name} repeats few of the own verdicts, unlike the rest: look at some of the judgements together"
        if _below(one.ratings, ORDERLY):
            assert one.ratings is not None
            yield (
                f"{name}: the better-ranked response has the higher rating in {_said(one.ratings)} of pairs: ask which "
                "end of the scale is the good one; do not use these ratings before"
            )
        if one.hurried > MANY:
            yield (
                f"{name} read {percent(one.hurried, 0)} of items at more than {FASTEST:g} characters a second, which "
                "nobody does: read some of the judgements before you use these labels"
            )
    unknown = [str(one.labeler) for one in found.labelers if one.right is None and one.judgements]
    if found.agreement is not None and unknown:
        yield (
            f"the reliability of {'labelers' if len(unknown) > 1 else 'labeler'} {words(unknown)} cannot be told: that "
            "needs items that three labelers have judged (overlap 3)"
        )


def _biases(found: Quality) -> Iterator[str]:
    earlier = found.earlier_wins
    if earlier is not None and earlier.excludes(0.5):
        yield (
            f"the response that is {'earlier' if earlier.mean > 0.5 else 'later'} on the page wins "
            f"{_said(earlier if earlier.mean > 0.5 else _turned(earlier))} of comparisons: the random order keeps it "
            "out of the mean, as noise; ask labelers to read all responses first, or show fewer at a time"
        )
    longer = found.longer_wins
    if longer is not None and longer.excludes(0.5) and max(longer.mean, 1 - longer.mean) >= SHORTCUT:
        side = "longer" if longer.mean > 0.5 else "shorter"
        yield (
            f"the {side} response wins {_said(longer if longer.mean > 0.5 else _turned(longer))} of comparisons: if "
            "length is not quality here, say so in the instructions; read length-controlled win rates after training"
        )


def _turned(found: Interval) -> Interval:
    """The interval of 1 - share."""
    low, high = found.ends or (None, None)
    ends = {"low": None if high is None else 1 - high, "high": None if low is None else 1 - low}
    return found.model_copy(update={"mean": 1 - found.mean, **ends})


def _times(found: Quality) -> Iterator[str]:
    if found.outliers:
        fast = sum(one.z < 0 for one in found.outliers)
        yield (
            f"{plural(len(found.outliers), 'judgement')} took a time far from the labeler's others ({fast} fast, "
            f"{len(found.outliers) - fast} slow): look at the fast ones first"
        )
    asked = found.judgements + found.skipped
    if found.skipped > MANY * asked:
        yield (
            f"{found.skipped} of {asked} items were skipped: read the reasons, and take out prompts that nobody can "
            "judge"
        )
