"""The quality of labels as types: what `rlhf label report --json` prints."""

from __future__ import annotations

from typing import Literal

from rlhf_pipeline.labelling.agreement import Level
from rlhf_pipeline.report.figures import Interval, Number, Part


class LabelerQuality(Part):
    """One labeler: how much, how fast, and how good. A figure is None where there is nothing to measure it by.

    seconds, speed: medians per item, in seconds and in characters read per second. hurried: share of items read faster
    than anybody reads. Judgements without a time have no part in these. agreement: with the others. consistency: with
    the own first sight. ratings: the better-ranked response has the higher rating. right, reliability: of the
    labeler-adjusted Bradley-Terry model.
    """

    labeler: int
    judgements: int
    skipped: int
    seconds: Number
    speed: Number
    hurried: float
    ties: Interval | None
    agreement: Interval | None
    consistency: Interval | None
    ratings: Interval | None
    right: Interval | None
    reliability: Interval | None


class Twosome(Part):
    """The agreement of two labelers."""

    labelers: tuple[int, int]
    agreement: Interval


class Alpha(Part):
    """Krippendorff's alpha of ranks, of ratings, or of a flag; of a flag also the shares of equal answers and of yes.

    alpha is None where no two labelers met, or where all answers were the same.
    """

    what: str
    level: Level
    values: int
    alpha: Interval | None
    same: Interval | None = None
    yes: Interval | None = None


class TimeOutlier(Part):
    """A judgement that took far more or far less time than its labeler's others; z: modified z-score of log seconds."""

    labeler: int
    item: int
    repeat: int
    seconds: float
    z: float


class ItemStrengths(Part):
    """The labeler-adjusted strength of each response of an item, by k, in units of their spread; the sum is 0."""

    item: int
    strengths: list[float]


class Quality(Part):
    """The quality of the labels of one project; shares have Wilson's 95 % interval over items.

    pairs: untied comparisons. places: win share by place on the page. length_slope: log-odds per 100 characters.
    reasons: why items were skipped, with counts. strengths: empty where no labeler's reliability can be told.
    findings: what is wrong, and what to do about it.
    """

    version: Literal[1] = 1
    items: int
    labelled: int
    judgements: int
    skipped: int
    repeats: int
    pairs: int
    ties: Interval | None
    agreement: Interval | None
    twosomes: list[Twosome]
    alphas: list[Alpha]
    consistency: Interval | None
    ratings: Interval | None
    rated_alike: Interval | None
    places: list[Interval]
    earlier_wins: Interval | None
    longer_wins: Interval | None
    length_slope: Interval | None
    outliers: list[TimeOutlier]
    reasons: dict[str, int]
    labelers: list[LabelerQuality]
    strengths: list[ItemStrengths]
    findings: list[str]
