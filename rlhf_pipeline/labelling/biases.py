"""What should not decide a preference and may do so: the place on the page, the length, the labeler's haste."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from rlhf_pipeline.evaluation.preference_metrics import accuracy, calibration_slope
from rlhf_pipeline.evaluation.statistics import Estimate
from rlhf_pipeline.labelling.kinds import Item, Judgement
from rlhf_pipeline.labelling.pairs import Pair, length, lengths_of, share

FAR = 3.5
"""A modified z-score beyond this is an outlier (Iglewicz and Hoaglin 1993)."""

NORMAL = 0.6745
"""The median absolute deviation of a standard normal."""

FEW_TIMES = 10
"""With fewer times of a labeler no outliers are looked for."""

FASTEST = 60.0
"""Characters a second that nobody reads: about 600 words a minute, twice what fast readers of English read
(Brysbaert 2019: 175 to 300 words a minute)."""

UNIT = 100
"""Characters per unit of the slope on length."""


def place_shares(pairs: Iterable[Pair]) -> list[Estimate]:
    """How often the response in each place on the page beats the other one, ties half; one half without a bias.

    Labelers see each item in a random order, so that the quality of responses has no part in this.

    Args:
        pairs: with ties.

    Returns:
        One share for each place from the first to the last that occurs, with its interval over items.
    """
    values: dict[int, list[float]] = defaultdict(list)
    items: dict[int, list[int]] = defaultdict(list)
    for pair in pairs:
        for response, won in ((pair.better, 0.5 if pair.tied else 1.0), (pair.worse, 0.5 if pair.tied else 0.0)):
            place = pair.judgement.shown.index(response)
            values[place].append(won)
            items[place].append(pair.item)
    return [found for place in sorted(values) if (found := share(values[place], items[place])) is not None]


def earlier_wins(pairs: Iterable[Pair]) -> Estimate | None:
    """How often the response that is earlier on the page beats the later one, ties half; one half without a bias."""
    values, items = [], []
    for pair in pairs:
        shown = pair.judgement.shown
        earlier = shown.index(pair.better) < shown.index(pair.worse)
        values.append(0.5 if pair.tied else float(earlier))
        items.append(pair.item)
    return share(values, items)


class LengthBias(NamedTuple):
    """How length goes with preference, over untied pairs.

    longer_wins: the share of pairs whose longer response is better, equal lengths half. slope: log-odds of being better
    per 100 characters more; None where it is not finite.
    """

    longer_wins: Estimate | None
    slope: Estimate | None


def length_bias(pairs: Sequence[Pair], lengths: Mapping[int, Sequence[int]]) -> LengthBias:
    """Share and slope of length.

        P(better) = sigma(slope x (length - length of the other) / 100)

    It is a logistic regression through the origin, since the order of a pair means nothing; every item has the same
    weight, and the interval is by item (`preference_metrics.calibration_slope`).

    Args:
        lengths: characters of each response of each item.
    """
    untied = [pair for pair in pairs if not pair.tied]
    if not untied:
        return LengthBias(None, None)
    gaps = [(lengths[pair.item][pair.better] - lengths[pair.item][pair.worse]) / UNIT for pair in untied]
    items = [str(pair.item) for pair in untied]
    return LengthBias(accuracy(gaps, items), calibration_slope(gaps, items))


def characters(items: Sequence[Item]) -> dict[int, int]:
    """What a labeler has to read of each item: the characters of the prompt and all responses."""
    prompts = {item.number: item.prompt for item in items}
    return {number: sum(lengths) + length(prompts[number]) for number, lengths in lengths_of(items).items()}


def speed(judgement: Judgement, read: Mapping[int, int]) -> float:
    """Characters of the item per second that the labeler took; infinite for no time at all."""
    return read[judgement.item] / judgement.seconds if judgement.seconds > 0 else math.inf


class Outlier(NamedTuple):
    """A judgement that took much more or less time than the same labeler's others."""

    judgement: Judgement
    z: float


def time_outliers(judgements: Iterable[Judgement]) -> list[Outlier]:
    """Judgements with a modified z-score beyond 3.5 within their labeler, the farthest first.

        z = .6745 (x - median x) / median |x - median x|,    x = log seconds

    Times are skewed to the right and their logs are not; medians are not moved by the outliers themselves (Iglewicz and
    Hoaglin 1993). Skipped items have no part in it, nor labelers with fewer than 10 times or whose times are mostly
    the same.
    """
    by_labeler: dict[int, list[Judgement]] = defaultdict(list)
    for one in judgements:
        if not one.skipped and one.seconds > 0:
            by_labeler[one.labeler].append(one)
    found = []
    for own in by_labeler.values():
        logs = [math.log(one.seconds) for one in own]
        centre = median(logs)
        spread = median(abs(x - centre) for x in logs)
        if len(own) >= FEW_TIMES and spread > 0:
            scores = (Outlier(one, NORMAL * (x - centre) / spread) for one, x in zip(own, logs, strict=True))
            found += [one for one in scores if abs(one.z) > FAR]
    return sorted(found, key=lambda one: (-abs(one.z), one.judgement.labeler, one.judgement.item))
