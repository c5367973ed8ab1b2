"""Accuracy, calibration and baselines, by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rlhf_pipeline.evaluation.preference_metrics import (
    accuracy,
    bayes_accuracy,
    calibration_slope,
    compare_scorers,
    expected_calibration_error,
    longer_wins,
    preference_metrics,
    reliability_bins,
    tfidf_bradley_terry,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_the_slope_of_two_margins_by_hand():
    """n1 margins +a and n2 margins -a: sigma(s a) = n1 / (n1 + n2), variance n / (n - 1) / (a^2 n p (1 - p))."""
    found = calibration_slope([2.0] * 3 + [-2.0], list("abcd"))
    assert found.mean == pytest.approx(math.log(3) / 2, rel=1e-12)
    half = 3.182446305 * math.sqrt(4 / 3 / (4 * 4 * 3 / 16))  # t(.975, 3)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), rel=1e-8)
    assert (found.n, found.clusters) == (4, 4)


def test_the_slope_of_three_margins_by_hand():
    """Margins 2, 1 and -1: 2 sigma(-2s) + sigma(-s) - sigma(s) = 0, that is with x = e^s
    2 / (1 + x^2) = (x - 1) / (x + 1), or x^3 - x^2 - x - 3 = 0."""
    x = max(root.real for root in np.roots([1, -1, -1, -3]) if abs(root.imag) < 1e-9)
    assert calibration_slope([2.0, 1.0, -1.0], list("abc")).mean == pytest.approx(math.log(x), rel=1e-10)


@pytest.mark.parametrize("factor", [1e-6, 0.457, 3.0, 1e6])
def test_rewards_times_c_have_the_slope_over_c(factor):
    draw = random.Random(0)
    margins = [draw.gauss(0.5, 1) for _ in range(60)]
    prompts = [f"p{draw.randrange(20)}" for _ in margins]
    one, other = calibration_slope(margins, prompts), calibration_slope([factor * m for m in margins], prompts)
    assert [factor * x for x in (other.mean, other.low, other.high)] == pytest.approx([one.mean, one.low, one.high])


def test_a_prompt_counts_once_in_the_slope_however_many_pairs_it_has():
    repeated = calibration_slope([2.0] * 5 + [2.0, 2.0, -2.0], ["a"] * 5 + ["b", "c", "d"])
    assert repeated.mean == pytest.approx(math.log(3) / 2, rel=1e-12) and repeated.clusters == 4
    once = calibration_slope([2.0, 2.0, 2.0, -2.0], list("abcd"))
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))


def test_the_slope_covers_the_scale_that_labels_were_drawn_at():
    """Labels drawn with P = sigma(2.19 r), as rewards shrunk x .457 have them: 95 % of 1,000 intervals hold 2.19."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        margins = rng.normal(0, 0.5, 200)
        drawn = np.where(rng.random(200) < 1 / (1 + np.exp(-2.19 * margins)), margins, -margins)
        found = calibration_slope(drawn, [str(i // 2) for i in range(200)])
        held += found.low <= 2.19 <= found.high
    assert 0.93 <= held / 1000 <= 0.97


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0], [0.0, 1.0]])
def test_margins_that_separate_the_labels_have_no_finite_slope(margins):
    assert calibration_slope(margins, ["a", "b"]) is None


@pytest.mark.parametrize("margins", [[1.0, -1e-300], [1e-300, -1.0], [1e300, -1.0, 1e-300]])
def test_margins_of_very_different_size_have_a_slope(margins):
    assert math.isfinite(calibration_slope(margins, list("abc")[: len(margins)]).mean)


def test_ties_are_half_right():
    found = accuracy([1.0, -2.0, 0.0, 3.0], ["a", "b", "c", "d"])
    assert found.mean == pytest.approx(2.5 / 4)
    assert found.clusters == 4


def test_accuracy_is_clustered_by_prompt():
    found = accuracy([1.0, 1.0, -1.0], ["a", "a", "b"])
    assert found.mean == pytest.approx(0.5)  # prompt means 1 and 0
    assert 0 < found.low < 0.01 and 0.99 < found.high < 1  # t(.975, 1) = 12.7 reaches far out
    prompts = [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0]
    found = accuracy(prompts, list("abcdefgh"))
    # Five of eight: squares 8 x 15/64; w = 25/64/2 of a prompt more at 0 adds w 8 / (8 + w) x 25/64; over 7 + w; m =
    # 5 / (8 + w). Wilson's ends solve (5/8 - q)^2 = t^2 q (1 - q) / n with t(.975, 7) = 2.364624.
    w = 25 / 128
    size = 8 * (5 / (8 + w)) * ((3 + w) / (8 + w)) / ((15 / 8 + w * 8 / (8 + w) * 25 / 64) / (7 + w))
    for end in (found.low, found.high):
        assert (0.625 - end) ** 2 == pytest.approx(2.364624**2 * end * (1 - end) / size, abs=1e-6)
    assert 0 < found.low < 0.625 < found.high < 1


def test_ece_by_hand_with_one_value_a_bin():
    # Confidences .6, .7, .9; right, wrong, right.
    found = expected_calibration_error([logit(0.6), -logit(0.7), logit(0.9)])
    assert found == pytest.approx((0.4 + 0.7 + 0.1) / 3, abs=1e-12)


def test_ece_by_hand_with_two_bins():
    # Sorted by confidence: .55 right, .65 wrong | .75 right, .95 right.
    differences = [logit(0.95), -logit(0.65), logit(0.75), logit(0.55)]
    expected = 0.5 * abs(0.5 - 0.6) + 0.5 * abs(1.0 - 0.85)
    assert expected_calibration_error(differences, bins=2) == pytest.approx(expected, abs=1e-12)


def test_ece_bins_hold_equally_many():
    # 30 values in 15 bins: two each. All at .8 in confidence; in each pair of neighbours one is right.
    differences = [logit(0.8) * (1 if k % 2 else -1) for k in range(30)]
    assert expected_calibration_error(differences) == pytest.approx(0.3, abs=1e-12)


def test_perfect_calibration_has_ece_0():
    differences = [logit(0.75)] * 75 + [-logit(0.75)] * 25
    assert expected_calibration_error(differences, bins=1) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error([0.0] * 10) == 0.0  # ties: confidence one half, half right


def test_ece_does_not_ask_which_side_was_confident():
    assert expected_calibration_error([-logit(0.9)], bins=1) == pytest.approx(0.9, abs=1e-12)


def test_reliability_bins_by_hand():
    differences = [logit(0.95), -logit(0.65), logit(0.75), logit(0.55), 0.0]
    # Confidences .5 (a tie), .55 right, .65 wrong | .75 right, .95 right.
    first, second = reliability_bins(differences, bins=2)
    assert first == (pytest.approx((0.5 + 0.55 + 0.65) / 3), pytest.approx(0.5), 3)
    assert second == (pytest.approx(0.85), 1.0, 2)
    assert [count for *_, count in reliability_bins(list(range(1, 32)))] == [3] + [2] * 14
    assert len(reliability_bins([1.0, 2.0])) == 2  # no empty bins


def test_calibration_counts_every_prompt_the_same():
    """One prompt with three pairs that are all wrong at .8, one with a single pair that is right at .6."""
    differences, clusters = [-logit(0.8)] * 3 + [logit(0.6)], ["a", "a", "a", "b"]
    found = preference_metrics(differences, clusters)
    assert found["accuracy"] == pytest.approx(1 / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.2) + math.log(0.6)) / 2, abs=1e-12)
    assert found["brier"] == pytest.approx((0.8**2 + 0.4**2) / 2, abs=1e-12)
    # One pair a bin: the weights are 1/6, 1/6, 1/6, 1/2.
    assert found["ece"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.8, abs=1e-12)
    ((sure, right, pairs),) = reliability_bins(differences, clusters, bins=1)
    assert (sure, right, pairs) == (pytest.approx(0.7), pytest.approx(0.5), 4)
    assert expected_calibration_error(differences, clusters, bins=1) == pytest.approx(0.2, abs=1e-12)


def test_mcnemar_by_hand():
    # The first is right on 9 pairs that the other has wrong, wrong on 1 that the other has right:
    # p = 2 (1 + 10) / 2^10.
    first = [1.0] * 9 + [-1.0] + [1.0] * 5 + [-1.0] * 2
    other = [-1.0] * 9 + [1.0] + [2.0] * 5 + [-3.0] * 2
    found = compare_scorers(first, other, [str(k) for k in range(17)])
    assert found["method"] == "mcnemar"
    assert found["p"] == pytest.approx(22 / 1024, abs=1e-12)
    assert found["difference"]["mean"] == pytest.approx(8 / 17)
    assert (found["difference"]["n"], found["difference"]["clusters"]) == (17, 17)
    back = compare_scorers(other, first, [str(k) for k in range(17)])
    assert (back["p"], back["difference"]["mean"]) == (pytest.approx(found["p"]), pytest.approx(-8 / 17))
    # A tie loses half a point to the right and gains one on the wrong.
    ties = compare_scorers([0.0] * 6, [1.0] * 6, list("abcdef"))
    assert (ties["p"], ties["difference"]["mean"]) == (pytest.approx(2 / 64), -0.5)
    assert compare_scorers(first, first, [str(k) for k in range(17)])["p"] == 1.0


def test_scorers_on_several_pairs_of_a_prompt():
    # Prompt means of the difference in correctness: 1, 1/2, 0; t = (1/2) / (1/2 / sqrt 3) with 2 degrees.
    found = compare_scorers([1, 1, 1, 1, 1, 1], [-1, -1, -1, 1, 1, 1], list("aabbcc"))
    assert found["method"] == "t over prompts"
    assert found["difference"]["mean"] == pytest.approx(0.5)
    assert found["p"] == pytest.approx(1 - math.sqrt(3) / math.sqrt(5), abs=1e-12)
    draw = np.random.default_rng(0)
    # Right or wrong together within a prompt: 120 prompts of 10 pairs are 120 observations, not 1,200.
    signs = np.where(draw.random((2, 120)) < [[0.6], [0.5]], 1.0, -1.0).repeat(10, 1)
    found = compare_scorers(*signs, np.arange(120).repeat(10))
    assert found["method"] == "clustered bootstrap"
    gap = ((signs[0] > 0).astype(float) - (signs[1] > 0))[::10]
    half = 1.96 * gap.std() / math.sqrt(120)
    assert found["difference"]["high"] - found["difference"]["mean"] == pytest.approx(half, rel=0.1)
    assert (found["p"] < 0.05) == (found["difference"]["low"] > 0)
    with pytest.raises(ValueError, match="the same pairs"):
        compare_scorers([1.0], [1.0, 2.0], ["a"])


def test_all_figures_by_hand():
    differences = [logit(0.8), -logit(0.6), 0.0]
    found = preference_metrics(differences, ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(0.5)
    assert (found["pairs"], found["prompts"]) == (3, 3)
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.5)) / 3, abs=1e-12)
    assert found["brier"] == pytest.approx((0.2**2 + 0.6**2 + 0.5**2) / 3, abs=1e-12)
    assert found["ece"] == pytest.approx((0.2 + 0.6 + 0.0) / 3, abs=1e-12)
    assert found["accuracy_low"] < 0.5 < found["accuracy_high"]


def test_an_uninformed_scorer():
    found = preference_metrics([0.0] * 6, list("abcdef"))
    assert (found["accuracy"], found["nll"]) == pytest.approx((0.5, math.log(2)))
    assert (found["brier"], found["ece"]) == (pytest.approx(0.25), 0.0)


@pytest.mark.filterwarnings("error")
def test_huge_differences_stay_finite():
    found = preference_metrics([500.0, -500.0], ["a", "b"])
    assert found["nll"] == pytest.approx(250.0)
    assert found["brier"] == pytest.approx(0.5)


def test_the_labels_own_ceiling():
    assert bayes_accuracy([0.9, 0.3, 0.5], ["a", "b", "c"]) == pytest.approx((0.9 + 0.7 + 0.5) / 3)
    assert bayes_accuracy([0.9, 0.5, 0.6], ["a", "a", "b"]) == pytest.approx((0.7 + 0.6) / 2)
    assert bayes_accuracy([0.9, None], ["a", "b"]) is None
    assert bayes_accuracy([], []) is None


def test_longer_wins_counts_tokens():
    assert longer_wins([[1, 2, 3], [1], [5, 5]], [[1], [1, 2], [6, 6]]) == [2.0, -1.0, 0.0]
    with pytest.raises(ValueError):
        longer_wins([[1]], [])


def pairs(count: int, seed: int, good: str = "kind", bad: str = "rude") -> list[tuple[str, str]]:
    draw = random.Random(seed)

    def text(word: str) -> str:
        words = [draw.choice(["a", "fair", "plain", "long", "odd", "tale"]) for _ in range(6)]
        words.insert(draw.randrange(7), word)
        return " ".join(words)

    return [(text(good), text(bad)) for _ in range(count)]


def test_tfidf_learns_a_separable_set():
    found = tfidf_bradley_terry(pairs(80, 0), pairs(40, 1))
    assert len(found) == 40 and min(found) > 0


def test_tfidf_is_antisymmetric_and_says_0_of_equal_texts():
    test = pairs(10, 1)
    forth = tfidf_bradley_terry(pairs(80, 0), test)
    back = tfidf_bradley_terry(pairs(80, 0), [(b, a) for a, b in test])
    assert back == pytest.approx([-value for value in forth], abs=1e-12)
    assert tfidf_bradley_terry(pairs(80, 0), [("a kind tale", "a kind tale")]) == [0.0]


def test_tfidf_learns_signs_that_are_no_letters():
    found = tfidf_bradley_terry(pairs(80, 0, "!!", "??"), pairs(40, 1, "!!", "??"))
    assert np.mean(np.array(found) > 0) > 0.9


def test_tfidf_of_random_labels_is_chance():
    draw = random.Random(5)
    shuffled = [pair if draw.random() < 0.5 else pair[::-1] for pair in pairs(400, 2)]
    found = np.array(tfidf_bradley_terry(shuffled[:200], shuffled[200:]))
    assert abs((found > 0).mean() - 0.5) < 4 * math.sqrt(0.25 / 200)


@pytest.mark.parametrize("train, test", [([], [("a", "b")]), ([("a", "b")], []), ([(" ", "")], [("a", "b")])])
def test_without_anything_to_learn_from_all_differences_are_0(train, test):
    assert tfidf_bradley_terry(train, test) == [0.0] * len(test)
