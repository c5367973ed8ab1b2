"""Biases by hand: place on the page, length, time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.labelling.biases import (
    characters,
    earlier_wins,
    length_bias,
    place_shares,
    speed,
    time_outliers,
)
from rlhf_pipeline.labelling.pairs import lengths_of, pairs_of
from tests.labelling.worlds import item, judgement, skipped


def test_places_by_hand():
    items = [item(0, "a", "b", "c"), item(1, "a", "b")]
    # Item 0 shows 2, 0, 1 and the ranks say 0 > 1 = 2: place 2 beats both others, which are tied.
    said = [judgement(1, 0, [1, 2, 2], shown=[2, 0, 1]), judgement(1, 1, [1, 2], shown=[0, 1])]
    pairs = pairs_of(items, said, ties=True)
    # First place: item 0 loses and ties (1/4), item 1 wins (1). Second: 1 and 0. Third: a tie and a loss.
    assert [found.mean for found in place_shares(pairs)] == pytest.approx([5 / 8, 1 / 2, 1 / 4], abs=1e-12)
    assert [found.clusters for found in place_shares(pairs)] == [2, 2, 1]
    # The earlier one: item 0 loses, ties, wins; item 1 wins.
    assert earlier_wins(pairs).mean == pytest.approx((1 / 2 + 1) / 2, abs=1e-12)
    assert place_shares([]) == [] and earlier_wins([]) is None


def test_a_labeler_who_takes_the_first_in_each_place():
    items = [item(n, "a", "b", "c", "d") for n in range(6)]
    draw = np.random.default_rng(0)
    said = []
    for n in range(6):
        shown = draw.permutation(4).tolist()
        said.append(judgement(1, n, [shown.index(k) + 1 for k in range(4)], shown=shown))
    pairs = pairs_of(items, said)
    assert [found.mean for found in place_shares(pairs)] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-12)
    assert earlier_wins(pairs).mean == 1.0


def test_the_slope_of_equal_gaps_is_the_logit_of_the_share():
    # All gaps are 200 characters: sigma(2 slope) = 3/4. One pair an item.
    items = [item(n, "x" * 300, "x" * 100) for n in range(4)]
    said = [judgement(1, n, [1, 2] if n else [2, 1]) for n in range(4)]
    found = length_bias(pairs_of(items, said), lengths_of(items))
    assert found.longer_wins.mean == 0.75
    assert found.slope.mean == pytest.approx(math.log(3) / 2, abs=1e-9)
    # Sandwich over items: scores d (1 - 3/4) three times and -d 3/4 once, information 4 d^2 3/16, d = 2.
    error = math.sqrt(4 / 3 * (3 / 16 + 9 / 16)) / (4 * 2 * 3 / 16)
    t_3 = 3.182446
    assert found.slope.high - found.slope.mean == pytest.approx(t_3 * error, abs=1e-5)


def test_length_without_a_finite_slope_and_without_pairs():
    items = [item(0, "long", "s"), item(1, "longer", "s")]
    found = length_bias(pairs_of(items, [judgement(1, 0, [1, 2]), judgement(1, 1, [1, 2])]), lengths_of(items))
    assert found.slope is None and found.longer_wins.mean == 1.0
    tied = pairs_of(items, [judgement(1, 0, [1, 1])], ties=True)
    assert length_bias(tied, lengths_of(items)) == (None, None)


def test_equal_lengths_are_half():
    items = [item(0, "ab", "cd"), item(1, "longer", "s")]
    found = length_bias(pairs_of(items, [judgement(1, 0, [1, 2]), judgement(1, 1, [1, 2])]), lengths_of(items))
    assert found.longer_wins.mean == 0.75


def test_speed_by_hand():
    items = [item(0, "x" * 40, "y" * 10, prompt="z" * 50)]
    read = characters(items)
    assert read == {0: 100}
    assert speed(judgement(1, 0, [1, 2], seconds=4.0), read) == 25.0
    assert speed(judgement(1, 0, [1, 2], seconds=0.0), read) == math.inf


def test_time_outliers_by_hand():
    # Logs to base 2 of the seconds: 0 ... 8 and 30. Median 4.5, deviations .5 .5 1.5 1.5 2.5 2.5 3.5 3.5 4.5 25.5.
    logs = [0, 1, 2, 3, 4, 5, 6, 7, 8, 30]
    said = [judgement(1, n, [1, 2], seconds=2.0**x) for n, x in enumerate(logs)]
    found = time_outliers([*said, skipped(1, 90, seconds=2.0**60), judgement(2, 1, [1, 2], seconds=1e9)])
    assert [one.judgement.item for one in found] == [9]
    assert found[0].z == pytest.approx(0.6745 * 25.5 / 2.5, abs=1e-9)
    assert time_outliers(said[1:]) == []  # nine times are too few
    same = [judgement(1, n, [1, 2], seconds=5.0 if n else 500.0) for n in range(12)]
    assert time_outliers(same) == []  # no spread to measure by


def test_outliers_of_each_labeler_the_farthest_first():
    slow = [judgement(1, n, [1, 2], seconds=2.0**x) for n, x in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 8, 30])]
    fast = [judgement(2, n, [1, 2], seconds=2.0**-x) for n, x in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 8, 40])]
    found = time_outliers([*slow, *fast])
    assert [(one.judgement.labeler, one.z > 0) for one in found] == [(2, False), (1, True)]
