"""Agreement: of labelers with one another, of labelers with themselves, of ratings with rankings.

Agreement counts pairs of responses that both sides put in an order: a coin has one half. Agreement beyond chance with
ties, ratings and flags is Krippendorff's alpha.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.evaluation.statistics import Estimate, count_blocks, prompt_codes, replicate_interval
from rlhf_pipeline.labelling.kinds import Judgement
from rlhf_pipeline.labelling.pairs import Pair, share

Level = Literal["nominal", "ordinal"]


class Verdicts(NamedTuple):
    """Whether two verdicts on one pair of responses are the same (1) or opposite (0), the item, and whose they are."""

    same: list[float]
    items: list[int]
    labelers: list[tuple[int, int]]

    def of(self, *labelers: int) -> Estimate | None:
        """The share of equal verdicts where all these labelers take part (none named: all), interval over items."""
        chosen = [n for n, two in enumerate(self.labelers) if set(labelers) <= set(two)]
        return share([self.same[n] for n in chosen], [self.items[n] for n in chosen])


def between(pairs: Iterable[Pair]) -> Verdicts:
    """Each two labelers on each pair of responses that both put in an order, at first sight of the item."""
    found: dict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
    for pair in pairs:
        if pair.judgement.repeat == 0 and not pair.tied:
            found[pair.key][pair.judgement.labeler] = pair.won
    verdicts = Verdicts([], [], [])
    for (item, _, _), said in found.items():
        for one, other in combinations(sorted(said), 2):
            verdicts.same.append(float(said[one] == said[other]))
            verdicts.items.append(item)
            verdicts.labelers.append((one, other))
    return verdicts


def within(pairs: Iterable[Pair]) -> Verdicts:
    """Each labeler at first sight against the same labeler at each repeat, on pairs that have an order both times."""
    first: dict[tuple[int, tuple[int, int, int]], float] = {}
    again: list[Pair] = []
    for pair in pairs:
        if pair.tied:
            continue
        if pair.judgement.repeat == 0:
            first[pair.judgement.labeler, pair.key] = pair.won
        else:
            again.append(pair)
    verdicts = Verdicts([], [], [])
    for pair in again:
        labeler = pair.judgement.labeler
        before = first.get((labeler, pair.key))
        if before is not None:
            verdicts.same.append(float(before == pair.won))
            verdicts.items.append(pair.item)
            verdicts.labelers.append((labeler, labeler))
    return verdicts


class Rated(NamedTuple):
    """Ranked pairs whose responses are both rated: the same order or the opposite one, and equal ratings."""

    order: Verdicts
    alike: Estimate | None


def ratings_against_ranks(pairs: Iterable[Pair]) -> Rated:
    """Whether the better-ranked response has the higher rating, where the ratings differ; and how often they do not."""
    order = Verdicts([], [], [])
    equal: list[float] = []
    items: list[int] = []
    for pair in pairs:
        better, worse = pair.judgement.ratings[pair.better], pair.judgement.ratings[pair.worse]
        if pair.tied or better is None or worse is None:
            continue
        equal.append(float(better == worse))
        items.append(pair.item)
        if better != worse:
            order.same.append(float(better > worse))
            order.items.append(pair.item)
            order.labelers.append((pair.judgement.labeler, pair.judgement.labeler))
    return Rated(order, share(equal, items))


def middle_ranks(ranks: Sequence[int]) -> list[float]:
    """Ranks 1 ... K in which tied responses share the mean of their places: (1, 2, 2, 3) -> (1, 2.5, 2.5, 4)."""
    return [sum(other < own for other in ranks) + (sum(other == own for other in ranks) + 1) / 2 for own in ranks]


class Value(NamedTuple):
    """What one labeler said of response k of an item: a rank, a rating, or 0 or 1 for a flag."""

    item: int
    response: int
    labeler: int
    value: float


def ranks_said(judgements: Iterable[Judgement]) -> list[Value]:
    """The ranks at first sight, ties at the mean of their places."""
    return [
        Value(one.item, k, one.labeler, rank)
        for one in _first_sights(judgements)
        for k, rank in enumerate(middle_ranks(one.ranks))
    ]


def ratings_said(judgements: Iterable[Judgement]) -> list[Value]:
    """The ratings at first sight."""
    return [
        Value(one.item, k, one.labeler, rating)
        for one in _first_sights(judgements)
        for k, rating in enumerate(one.ratings)
        if rating is not None
    ]


def flags_said(judgements: Iterable[Judgement]) -> dict[str, list[Value]]:
    """The answers to each flag at first sight, 1 for yes."""
    found: dict[str, list[Value]] = defaultdict(list)
    for one in _first_sights(judgements):
        for k, flags in enumerate(one.flags):
            for flag, answer in flags.items():
                found[flag].append(Value(one.item, k, one.labeler, float(answer)))
    return dict(found)


def _first_sights(judgements: Iterable[Judgement]) -> list[Judgement]:
    return [one for one in judgements if one.repeat == 0 and not one.skipped]


def same_answers(values: Iterable[Value]) -> Estimate | None:
    """The share of equal answers of two labelers to one question about one response, interval over items."""
    units: dict[tuple[int, int], list[float]] = defaultdict(list)
    for one in values:
        units[one.item, one.response].append(one.value)
    two = [(a == b, item) for (item, _), said in units.items() for a, b in combinations(said, 2)]
    return share([float(same) for same, _ in two], [item for _, item in two])


def alpha(values: Iterable[Value], level: Level) -> Estimate | None:
    """Krippendorff's alpha of labelers, with an interval over items: 1 is full agreement, 0 is chance.

        alpha = 1 - D_o / D_e = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck

    o_ck: how often values c and k meet at one response, each response with weight 1 / (labelers - 1); n_c = sum_k o_ck;
    n = sum_c n_c. d_ck: 1 for c != k (nominal), or the square of the number of values between the two, each end
    counting one half (ordinal). (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"; the value is that of
    the package `krippendorff`.) Responses of one item depend on each other: replicates redraw items.

    Returns:
        None where no two labelers met at a response, or where all said the same value: then chance has no disagreement
        and alpha is 0 / 0. Where no two labelers disagree, alpha is 1 and its interval is not known.
    """
    units: dict[tuple[int, int], list[float]] = defaultdict(list)
    for one in values:
        units[one.item, one.response].append(one.value)
    met = {unit: said for unit, said in units.items() if len(said) > 1}
    domain = sorted({value for said in met.values() for value in said})
    if len(domain) < 2:
        return None
    counts = np.array([[said.count(value) for value in domain] for said in met.values()], dtype=np.float64)
    items = prompt_codes([item for item, _ in met])
    replicates = alpha_replicates(counts, items, level)
    groups = int(items.max()) + 1
    found = replicate_interval(_package(counts, domain, level), replicates, groups, n=int(counts.sum()))
    # Without any disagreement all replicates are 1: how often there may be one, the sample cannot say.
    return replace(found, low=-math.inf, high=math.inf) if ((counts > 0).sum(1) == 1).all() else found


def _package(counts: np.ndarray, domain: Sequence[float], level: Level) -> float:
    try:
        import krippendorff
    except ModuleNotFoundError as error:
        raise BadInput(
            "the package krippendorff is missing, which the agreement of labelers is computed with; "
            'install it with: pip install "rlhf-pipeline[label]"'
        ) from error
    return float(
        krippendorff.alpha(value_counts=counts.astype(int), value_domain=list(domain), level_of_measurement=level)
    )


def alpha_replicates(counts: np.ndarray, items: np.ndarray, level: Level) -> np.ndarray:
    """Alpha of bootstrap samples of items, those without any variation left out: (U, V), (U,) -> (at most B,).

    The ordinal d_ck is (m_c - m_k)^2 with the middle of the values up to c, m_c = sum over g <= c of n_g - n_c / 2.

    Args:
        counts: how many labelers gave each of V values at each of U responses; at least two at each.
        items: the number of the item of each response, 0 ... P - 1.
    """
    groups, size = int(items.max()) + 1, counts.shape[1]
    met = counts[:, :, None] * counts[:, None, :] - np.eye(size) * counts[:, None, :]
    met /= (counts.sum(1) - 1)[:, None, None]
    by_item = np.zeros((groups, size, size))
    np.add.at(by_item, items, met)
    found = [
        _alphas((block @ by_item.reshape(groups, -1)).reshape(-1, size, size), level) for block in count_blocks(groups)
    ]
    return np.concatenate(found)


def _alphas(met: np.ndarray, level: Level) -> np.ndarray:
    """Alpha of each coincidence matrix (b, V, V); matrices with one value only are left out."""
    n = met.sum(2)
    if level == "nominal":
        distance = np.broadcast_to(1.0 - np.eye(met.shape[1]), met.shape)
    else:
        middle = n.cumsum(1) - n / 2
        distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    observed = (met * distance).sum((1, 2))
    expected = (n[:, :, None] * n[:, None, :] * distance).sum((1, 2))
    there = expected > 0
    return 1 - (n.sum(1)[there] - 1) * observed[there] / expected[there]


def tied_share(pairs: Iterable[Pair]) -> Estimate | None:
    """The share of comparisons that are ties, interval over items; the pairs must be there with ties."""
    chosen = list(pairs)
    return share([float(pair.tied) for pair in chosen], [pair.item for pair in chosen])
