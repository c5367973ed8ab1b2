"""Agreement by hand: of labelers, of repeats, of ratings with ranks, and Krippendorff's alpha."""

from __future__ import annotations

import builtins
import math
import sys

import numpy as np
import pytest

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.evaluation.statistics import cluster_mean
from rlhf_pipeline.labelling.agreement import (
    Value,
    alpha,
    alpha_replicates,
    between,
    flags_said,
    middle_ranks,
    ranks_said,
    ratings_against_ranks,
    ratings_said,
    same_answers,
    tied_share,
    within,
)
from rlhf_pipeline.labelling.pairs import lengths_of, pairs_of
from tests.labelling.worlds import item, judgement, skipped

THREE = [item(0, "a", "b", "c")]


def test_pairs_of_a_ranking():
    said = [judgement(7, 0, [2, 1, 2])]
    untied = pairs_of(THREE, said)
    assert [(pair.better, pair.worse) for pair in untied] == [(1, 0), (1, 2)]
    assert [pair.won for pair in untied] == [0.0, 1.0] and not any(pair.tied for pair in untied)
    (tie,) = [pair for pair in pairs_of(THREE, said, ties=True) if pair.tied]
    assert (tie.better, tie.worse, tie.won, tie.key) == (0, 2, 0.5, (0, 0, 2))
    assert pairs_of(THREE, [judgement(1, 0, [1, 1, 1]), skipped(2, 0)]) == []


def test_judgements_that_do_not_fit_the_items_are_refused():
    with pytest.raises(ValueError, match="found a judgement of 2 responses, expected its 3 responses"):
        pairs_of(THREE, [judgement(1, 0, [1, 2])])
    with pytest.raises(ValueError, match=r"item 5: .* expected an item of the project"):
        pairs_of(THREE, [judgement(1, 5, [1, 2])])


def test_lengths_in_characters_of_texts_and_messages():
    chat = [{"role": "assistant", "content": "four"}]  # "assistant: four"
    assert lengths_of([item(3, "", "ab"), item(4, "four", chat)]) == {3: [0, 2], 4: [4, 15]}


def test_agreement_of_two_labelers_by_hand():
    # 1 > 2 > 3 against 2 > 1 > 3: the pair of 1 and 2 differs. The tie of labeler 3 leaves one pair less.
    said = [judgement(1, 0, [1, 2, 3]), judgement(2, 0, [2, 1, 3]), judgement(3, 0, [1, 1, 2])]
    found = between(pairs_of(THREE, said))
    assert found.of(1, 2).mean == pytest.approx(2 / 3, abs=1e-12)
    assert found.of(1, 3).mean == found.of(2, 3).mean == 1.0
    assert found.of().mean == pytest.approx(6 / 7, abs=1e-12) and found.of().n == 7
    assert found.of(1).mean == pytest.approx(4 / 5, abs=1e-12)
    assert found.of(1, 9) is None


def test_agreement_counts_items_alike_and_its_interval_is_over_items():
    two = [item(0, "a", "b", "c"), item(1, "a", "b"), item(2, "a", "b")]
    said = [judgement(1, 0, [1, 2, 3]), judgement(2, 0, [2, 1, 3])]  # 2 of 3
    said += [judgement(1, 1, [1, 2]), judgement(2, 1, [2, 1]), judgement(1, 2, [1, 2]), judgement(2, 2, [1, 2])]
    found = between(pairs_of(two, said)).of()
    assert found.mean == pytest.approx((2 / 3 + 0 + 1) / 3, abs=1e-12)  # by pair it were 3 / 5
    expected = cluster_mean([1, 0, 1, 0, 1], ["x", "x", "x", "y", "z"], share=True)
    assert (found.low, found.high, found.clusters) == (expected.low, expected.high, 3)


def test_a_repeat_is_no_second_labeler_and_a_labeler_agrees_with_the_own_first_sight():
    said = [judgement(1, 0, [1, 2, 3]), judgement(1, 0, [1, 3, 2], repeat=1), judgement(2, 0, [3, 2, 1])]
    pairs = pairs_of(THREE, said)
    assert between(pairs).of().mean == 0.0 and between(pairs).of().n == 3
    assert within(pairs).of(1).mean == pytest.approx(2 / 3, abs=1e-12)
    assert within(pairs).of(2) is None
    assert within(pairs_of(THREE, reversed(said))).of(1).n == 3  # the order of judgements means nothing


def test_ratings_against_ranks_by_hand():
    said = [judgement(1, 0, [1, 2, 2], ratings=[5, 5, 6]), judgement(2, 0, [1, 2, 3], ratings=[7, None, 1])]
    found = ratings_against_ranks(pairs_of(THREE, said, ties=True))
    # Labeler 1: ranked 0 > 1 (rated alike), 0 > 2 (rated the other way); labeler 2: 0 > 2 (the same way).
    assert found.order.of().mean == 0.5 and found.order.of(1).mean == 0.0 and found.order.of(2).mean == 1.0
    assert found.alike.mean == pytest.approx(1 / 3, abs=1e-12) and found.alike.n == 3


def test_ties_by_hand():
    said = [judgement(1, 0, [1, 1, 2]), judgement(2, 0, [1, 1, 1])]
    assert tied_share(pairs_of(THREE, said, ties=True)).mean == pytest.approx(4 / 6, abs=1e-12)


def test_ranks_ratings_and_flags_that_alpha_reads():
    assert middle_ranks([1, 2, 2, 3]) == [1, 2.5, 2.5, 4] and middle_ranks([1, 1, 1]) == [2, 2, 2]
    said = [
        judgement(1, 0, [1, 1, 2], ratings=[7, None, 2], flags=[{"sexual": True}, {}, {"sexual": False}]),
        judgement(1, 0, [2, 1, 3], repeat=1, ratings=[1, 1, 1]),
        skipped(2, 0),
    ]
    assert ranks_said(said) == [Value(0, 0, 1, 1.5), Value(0, 1, 1, 1.5), Value(0, 2, 1, 3.0)]
    assert ratings_said(said) == [Value(0, 0, 1, 7), Value(0, 2, 1, 2)]
    assert flags_said(said) == {"sexual": [Value(0, 0, 1, 1.0), Value(0, 2, 1, 0.0)]}


def values(*units: tuple[float, ...]) -> list[Value]:
    """One response of an item of its own for each tuple of what its labelers said."""
    return [Value(number, 0, labeler, value) for number, said in enumerate(units) for labeler, value in enumerate(said)]


def test_nominal_alpha_by_hand():
    pytest.importorskip("krippendorff")
    # o_00 = o_11 = 2, o_01 = o_10 = 1; n = (3, 3): D_o = 2/6, D_e = 18/30.
    found = alpha(values((0, 0), (1, 1), (0, 1), (1,)), "nominal")
    assert found.mean == pytest.approx(1 - (2 / 6) / (18 / 30), abs=1e-12)
    assert (found.n, found.clusters) == (6, 3)  # the response of one labeler has no part in it
    assert same_answers(values((0, 0), (1, 1), (0, 1), (1,))).mean == pytest.approx(2 / 3, abs=1e-12)


def test_ordinal_alpha_by_hand():
    pytest.importorskip("krippendorff")
    # n = (5, 2, 1): d_12 = (7 - 7/2)^2, d_23 = (3 - 3/2)^2, d_13 = (8 - 6/2)^2; D_o = 2 25 / 8, D_e = 504 / 56 = 9.
    found = alpha(values((1, 1), (1, 1), (2, 2), (1, 3)), "ordinal")
    assert found.mean == pytest.approx(1 - 6.25 / 9, abs=1e-12)


def published() -> list[Value]:
    """The four observers of Krippendorff 2011, section C: alpha is .743 (nominal) and .815 (ordinal)."""
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    return [Value(n, 0, j, float(x)) for j, row in enumerate(rows) for n, x in enumerate(row) if x != "."]


def test_published_alphas():
    pytest.importorskip("krippendorff")
    assert alpha(published(), "nominal").mean == pytest.approx(0.743, abs=5e-4)
    assert alpha(published(), "ordinal").mean == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_a_replicate_is_the_alpha_of_the_redrawn_items(level, monkeypatch):
    krippendorff = pytest.importorskip("krippendorff")
    draw = np.random.default_rng(3)
    counts = draw.multinomial(3, [0.2, 0.5, 0.3], size=12).astype(float)  # 12 responses of 5 items, three labelers
    items = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4])
    blocks = draw.multinomial(5, [0.2] * 5, size=6).astype(float)
    monkeypatch.setattr("rlhf_pipeline.labelling.agreement.count_blocks", lambda groups: [blocks[:4], blocks[4:]])
    expected = [
        krippendorff.alpha(
            value_counts=np.repeat(counts, block[items].astype(int), axis=0).astype(int), level_of_measurement=level
        )
        for block in blocks
    ]
    assert alpha_replicates(counts, items, level) == pytest.approx(expected, abs=1e-12)


def test_alpha_without_disagreement_has_no_known_interval():
    found = alpha(values((1, 1), (2, 2), (1, 1), (2, 2)), "ordinal")
    assert found.mean == pytest.approx(1.0, abs=1e-12) and (found.low, found.high) == (-math.inf, math.inf)
    found = alpha(values((1, 1), (2, 2), (1, 1), (2, 1)), "ordinal")
    assert math.isfinite(found.low) and found.low < found.mean < 1


def test_alpha_without_variation_or_without_two_labelers_is_none():
    assert alpha(values((1, 1), (1, 1)), "nominal") is None
    assert alpha(values((1,), (2,)), "ordinal") is None
    assert alpha([], "ordinal") is None


def test_full_agreement_and_full_disagreement():
    pytest.importorskip("krippendorff")
    assert alpha(values((1, 1), (2, 2)), "ordinal").mean == pytest.approx(1.0, abs=1e-12)
    assert alpha(values((1, 2), (2, 1)), "nominal").mean < 0


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "krippendorff":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "krippendorff", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BadInput, match=r'pip install "rlhf-pipeline\[label\]"'):
        alpha(values((0, 1), (1, 1)), "nominal")


def grades(draw: np.random.Generator, items: int, level: str) -> list[Value]:
    """Three labelers grade two responses of each item, 1 ... 5, or flag those whose quality they take to be above 1.

    The quality is in part that of the item.
    """
    found = []
    for n in range(items):
        common = draw.normal()
        for k in range(2):
            quality = common + 0.7 * draw.normal()
            for labeler in range(3):
                seen = quality + 0.8 * draw.normal()
                value = float(np.clip(round(3 + seen), 1, 5)) if level == "ordinal" else float(seen > 1)
                found.append(Value(n, k, labeler, value))
    return found


@pytest.mark.slow
@pytest.mark.check
@pytest.mark.parametrize("level", ["ordinal", "nominal"])
@pytest.mark.parametrize("items", [25, 100])
def test_intervals_of_alpha_cover_that_of_a_very_large_sample(level, items):
    """200 projects; a standard error of the coverage is 1.5 points."""
    krippendorff = pytest.importorskip("krippendorff")
    large = [one.value for one in grades(np.random.default_rng(99), 40_000, level)]
    truth = krippendorff.alpha(np.array(large).reshape(-1, 3).T, level_of_measurement=level)
    found = [alpha(grades(np.random.default_rng(seed), items, level), level) for seed in range(200)]
    covered = sum(one.low <= truth <= one.high for one in found) / 200
    assert 0.9 <= covered <= 0.985, covered
