"""The quality of a project's labels as a whole: figures by hand, findings, tables and page."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_pipeline.labelling.figures import Quality
from rlhf_pipeline.labelling.kinds import Item, Judgement
from rlhf_pipeline.labelling.quality import measure_quality
from rlhf_pipeline.labelling.quality_tables import quality_tables
from rlhf_pipeline.labelling.report_page import REPORT, LivePage, quality_page, write_report
from tests.labelling.worlds import crowd, item, judgement, skipped

pytest.importorskip("krippendorff", reason="the extra label is not installed")


def small() -> tuple[list[Item], list[Judgement]]:
    """Two items of two responses, three labelers, one repeat, one skip."""
    items = [item(0, "xx" * 50, "x" * 20, prompt="p" * 30), item(1, "a", "b", prompt="")]
    said = [
        judgement(1, 0, [1, 2], ratings=[7, 2], flags=[{"sexual": False}, {"sexual": True}], seconds=5.0),
        judgement(2, 0, [2, 1], ratings=[3, 3], flags=[{"sexual": False}, {"sexual": False}], seconds=2.0),
        judgement(3, 1, [1, 1], seconds=10.0),
        judgement(1, 0, [1, 2], repeat=1, shown=[1, 0], ratings=[1, 5], seconds=15.0),
        judgement(1, 1, [2, 1], seconds=1.0),
        skipped(2, 1, reason=" no idea "),
    ]
    return items, said


def test_the_figures_of_a_small_project_by_hand():
    found = measure_quality(*small())
    counts = (found.items, found.labelled, found.judgements, found.skipped, found.repeats, found.pairs)
    assert counts == (2, 2, 5, 1, 1, 4)
    assert found.ties.mean == pytest.approx((0 + 1 / 2) / 2)  # none of item 0, one of two comparisons of item 1
    assert found.agreement.mean == 0.0 and [one.labelers for one in found.twosomes] == [(1, 2)]
    assert found.consistency.mean == 1.0
    assert found.ratings.mean == 0.5 and found.rated_alike.mean == pytest.approx(1 / 3)
    # The earlier one wins: item 0 1, 0, and 0 in the repeat (it shows 1 first); item 1 0 and one half.
    assert found.earlier_wins.mean == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert [one.mean for one in found.places] == pytest.approx([(1 / 3 + 1 / 4) / 2, (2 / 3 + 3 / 4) / 2])
    # Length: item 0 longer wins in 2 of 3, item 1 equal lengths.
    assert found.longer_wins.mean == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.reasons == {"no idea": 1} and found.outliers == [] and found.strengths == []
    first, second, third = found.labelers
    assert (first.labeler, first.judgements, first.skipped, first.seconds) == (1, 3, 0, 5.0)
    # 150 characters in 5 and 15 seconds, 2 in 1: 30, 10, 2 a second.
    assert first.speed == 10.0 and first.hurried == 0.0
    assert second.speed == 75.0 and second.hurried == 1.0 and second.skipped == 1
    assert second.agreement.mean == 0.0 and third.agreement is None and third.ties.mean == 1.0
    assert first.right is None and first.reliability is None
    ranks, ratings, sexual = found.alphas
    assert (ranks.what, ranks.level, ranks.values) == ("ranks", "ordinal", 8)
    assert (ratings.what, ratings.values) == ("ratings", 4)
    assert (sexual.what, sexual.level, sexual.same.mean, sexual.yes.mean) == ("sexual", "nominal", 0.5, 0.25)


def test_alpha_of_ranks_by_hand():
    # Two labelers of one item: (1, 2) and (2, 1). o_12 = o_21 = 2, n = (2, 2): alpha = 1 - 3 4 / (2 4) = -1/2.
    items = [item(0, "a", "b")]
    found = measure_quality(items, [judgement(1, 0, [1, 2]), judgement(2, 0, [2, 1])])
    assert found.alphas[0].alpha.mean == pytest.approx(-0.5, abs=1e-12)


def test_a_project_of_three_labelers_has_reliabilities_and_strengths():
    items, said = crowd(np.random.default_rng(3), [1.0, 2.0, 2.0], items=40, size=3)
    found = measure_quality(items, said)
    assert [one.right is not None for one in found.labelers] == [True] * 3
    logs = [math.log(one.reliability.mean) for one in found.labelers]
    assert sum(logs) == pytest.approx(0, abs=1e-9)
    assert [one.item for one in found.strengths] == list(range(40))
    assert all(abs(sum(one.strengths)) < 1e-9 and len(one.strengths) == 3 for one in found.strengths)


def test_nothing_labelled_yet():
    found = measure_quality([item(0, "a", "b")], [])
    (finding,) = found.findings
    assert finding.startswith("no item has been labelled yet") and found.labelers == [] and found.alphas == []
    assert "No item has been labelled yet" in quality_page(found, "empty")
    assert [one.title for one in quality_tables(found)] == ["all labels"]


def many(ranks: Sequence[Sequence[int]], *, items: int = 60, **given: object) -> Quality:
    """Items that labeler j ranks as `ranks[j]`."""
    made = [item(n, "a" * 10, "b" * 10) for n in range(items)]
    said = [judgement(j, n, own, **given) for n in range(items) for j, own in enumerate(ranks)]
    return measure_quality(made, said)


def test_findings_say_what_to_do():
    said = many([[1, 2]]).findings
    assert any("make the next project with overlap 3" in one for one in said)
    alternating = [item(n, "a", "b") for n in range(60)]
    coin = [judgement(j, n, [1, 2] if j == 0 or n % 2 else [2, 1]) for n in range(60) for j in (0, 1)]
    assert any("which a coin may reach" in one for one in measure_quality(alternating, coin).findings)
    weak = [judgement(j, n, [1, 2] if j == 0 or n % 20 < 12 else [2, 1]) for n in range(400) for j in (0, 1)]
    low = measure_quality([item(n, "a", "b") for n in range(400)], weak).findings
    assert any(one.startswith("labelers agree on 60 % (95 % interval 55 % to 65 %)") for one in low)
    assert any("the reliability of labelers 0 and 1 cannot be told" in one for one in low)


def test_findings_on_biases():
    first = many([[1, 2]]).findings  # each response 0 is shown first
    assert any(one.startswith("the response that is earlier on the page wins 100 %") for one in first)
    assert not any("the longer response" in one for one in first)
    last = many([[2, 1]]).findings
    assert any(one.startswith("the response that is later on the page wins 100 %") for one in last)
    items = [item(n, "a" * 90, "b" * 10) for n in range(60)]
    said = measure_quality(items, [judgement(1, n, [2, 1], shown=[n % 2, 1 - n % 2]) for n in range(60)]).findings
    assert any(one.startswith("the shorter response wins 100 %") for one in said)
    assert not any("on the page" in one for one in said)


def test_findings_on_labelers():
    items, said = crowd(np.random.default_rng(5), [2.0, 2.0, 2.0, -2.0, 0.0], items=60)
    found = measure_quality(items, said).findings
    assert any(one.startswith("labeler 3 is more often wrong than right") for one in found)
    assert any(one.startswith("labeler 4: ") and "cannot be told from guessing" in one for one in found)
    assert not any(one.startswith(("labeler 0", "labeler 1", "labeler 2")) for one in found)
    turned = many([[1, 2]], ratings=[2, 6]).findings
    assert any("ask which end of the scale is the good one" in one for one in turned)
    hurried = many([[1, 2]], seconds=0.1).findings
    assert any(one.startswith("labeler 0 read 100 % of items at more than 60 characters a second") for one in hurried)


def test_few_labels_raise_no_alarm():
    """Three repeats of which one differs, and ratings that follow two ranks of three: the intervals are wide."""
    items = [item(n, "a", "b") for n in range(3)]
    said = [judgement(1, n, [1, 2], ratings=[5, 3] if n else [3, 5], shown=[n % 2, 1 - n % 2]) for n in range(3)]
    said += [judgement(1, n, [1, 2] if n else [2, 1], repeat=1, shown=[n % 2, 1 - n % 2]) for n in range(3)]
    found = measure_quality(items, said)
    assert found.consistency.mean == pytest.approx(2 / 3) and found.ratings.mean == pytest.approx(2 / 3)
    assert ["nothing is known of their agreement" in one for one in found.findings] == [True]


def test_findings_on_repeats_flags_times_and_skips():
    items = [item(n, "a", "b") for n in range(60)]
    said = [judgement(1, n, [1, 2], flags=[{"sexual": True}, {}]) for n in range(60)]
    again = [judgement(1, n, [1 + n % 2, 2 - n % 2], repeat=1) for n in range(60)]
    other = [judgement(2, n, [1, 2], flags=[{"sexual": n % 2 == 0}, {}]) for n in range(60)]
    skips = [skipped(3, n) for n in range(40)]
    slow = [judgement(4, n, [1, 2], seconds=1e6 if n == 0 else 30.0 + n % 3) for n in range(60)]
    found = measure_quality(items, [*said, *again, *other, *skips, *slow]).findings
    assert any(one.startswith("labelers repeat 50 %") for one in found)
    assert any(one.startswith("the flag sexual: alpha is −0.") for one in found)
    assert any("took a time far from the labeler's others (0 fast, 1 slow)" in one for one in found)
    assert any(one.startswith("40 of 280 items were skipped") for one in found)


def test_good_labels_have_no_findings():
    draw = np.random.default_rng(2)
    items = [item(n, *("x" * int(draw.integers(20, 60)) for _ in range(3))) for n in range(60)]
    said = []
    for n in range(60):
        for j in range(3):
            own, shown = draw.permutation(3), draw.permutation(3).tolist()
            ranks = [1, 2, 3] if j == 0 else [1, 3, 2] if own[0] == 0 else [1, 2, 3]
            ranks = [ranks[(k + n) % 3] for k in range(3)]
            said.append(judgement(j, n, ranks, shown=shown, ratings=[8 - 2 * rank for rank in ranks]))
    found = measure_quality(items, said)
    assert found.findings == []


def test_judgements_without_a_time_are_not_hurried():
    items = [item(0, "a" * 300, "b"), item(1, "a" * 300, "b")]
    (one,) = measure_quality(items, [judgement(1, n, [1, 2], seconds=0.0) for n in range(2)]).labelers
    assert (one.seconds, one.speed, one.hurried) == (None, None, 0.0)
    said = [judgement(1, 0, [1, 2], seconds=0.0), judgement(1, 1, [1, 2], seconds=2.0)]
    (one,) = measure_quality(items, said).labelers
    assert (one.seconds, one.hurried) == (2.0, 1.0)  # 317 characters in two seconds


def test_the_json_has_no_number_that_json_cannot_hold():
    found = measure_quality([item(0, "a", "b")], [judgement(j, 0, [1, 2], seconds=0.0) for j in range(3)])
    text = found.model_dump_json()
    assert json.loads(text)["labelers"][0]["speed"] is None and "NaN" not in text and "Infinity" not in text
    assert Quality.model_validate_json(text) == found


def test_tables_name_every_figure():
    tables = {one.title: one for one in quality_tables(measure_quality(*small()))}
    assert all(len(row) == len(one.columns) for one in tables.values() for row in one.texts())
    assert tables["all labels"].texts()[4][:2] == ["agreement of labelers", "0.00 [0.00, 1.00]"]
    assert tables["reasons of skips"].texts() == [["no idea", "1"]]
    assert tables["labelers"].texts()[2][:4] == ["3", "1", "–", "–"]
    assert tables["pace of labelers"].texts()[2] == ["3", "0", "1.00 [0.00, 1.00]", "10 s", "0.2", "0 %"]
    assert "times far from the labeler's others" not in tables


class Store:
    """What the report reads of a project."""

    def __init__(self, items: list[Item], judgements: list[Judgement]):
        self._items, self._judgements = items, judgements

    def items(self) -> list[Item]:
        return self._items

    def judgements(self) -> list[Judgement]:
        return self._judgements


@pytest.mark.check  # it draws
def test_the_page_is_valid_shows_every_table_and_escapes_what_people_wrote(tmp_path):
    items, said = small()
    said.append(skipped(3, 1, reason="<script>alert(1)</script>"))
    found = write_report(Store(items, said), tmp_path, "a & b")
    text = (tmp_path / REPORT).read_text(encoding="utf-8")
    assert found == measure_quality(items, said)
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert root.find("head/title").text == "a & b – quality of labels"
    assert [one.get("id") for one in root.iter("section") if one.get("id")] == [
        "all",
        "labelers",
        "alpha",
        "place",
        "time",
    ]
    assert not list(root.iter("script")) and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    words = "".join(root.itertext())
    for table in quality_tables(found):
        for row in table.rows:
            assert str(row[0]) in words


@pytest.mark.check
def test_the_page_draws_reliabilities():
    items, said = crowd(np.random.default_rng(3), [1.0, 2.0, 2.0], items=20, size=2)
    root = ElementTree.fromstring(quality_page(measure_quality(items, said), "x").removeprefix("<!DOCTYPE html>\n"))
    bars = [one for one in root.iter("svg") if one.get("class") == "bar"]
    assert len(bars) == 3
    good = measure_quality(items, said).model_copy(update={"findings": []})
    assert "Nothing stands out." in quality_page(good, "x")


def test_a_live_page_is_made_anew_only_for_other_judgements(monkeypatch):
    made = []
    monkeypatch.setattr(
        "rlhf_pipeline.labelling.report_page.quality_page", lambda found, name: made.append(name) or "x"
    )
    items, said = small()
    store = Store(items, said)
    live = LivePage(store, "demo")
    assert (live.text(), live.text(), made) == ("x", "x", ["demo"])
    store._judgements = [*said[:-1], skipped(2, 1, reason="another")]  # as many, one of them another
    assert live.text() == "x" and made == ["demo", "demo"]
