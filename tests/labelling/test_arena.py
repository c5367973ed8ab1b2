"""The arena: verdicts, win rates, standings and agreement by hand; and a project read for a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.errors import ConfigError
from rlhf_pipeline.evaluation.elo import rank
from rlhf_pipeline.evaluation.statistics import cluster_mean
from rlhf_pipeline.evaluation.two_way import two_way_share
from rlhf_pipeline.labelling.arena import (
    Verdict,
    agreement,
    arena_digest,
    arena_of,
    by_scores,
    read_arena,
    standings,
    verdicts,
    win_rates,
)
from rlhf_pipeline.labelling.arena_tables import arena_tables
from rlhf_pipeline.labelling.kinds import Item, Judgement, NoteAction, RankAction, Response, SkipAction, SubmitAction
from rlhf_pipeline.labelling.report_page import LivePage
from rlhf_pipeline.labelling.store import LabelStore, database


def item(number: int, *sources: str | None, prompt: str | None = None) -> Item:
    responses = [Response(text=f"text {k}", source=source) for k, source in enumerate(sources)]
    return Item(number=number, kind="arena", prompt=prompt or f"prompt {number}", responses=responses)


def judgement(number: int, ranks: Sequence[int], labeler: int = 1, **changes: object) -> Judgement:
    values = {"labeler": labeler, "item": number, "repeat": 0, "shown": list(range(len(ranks))), "ranks": list(ranks)}
    rest = {"ratings": [None] * len(ranks), "flags": [{}] * len(ranks), "seconds": 1.0, "at": 0.0}
    return Judgement.model_validate({**values, **rest, **changes})


def verdict(prompt: str, labeler: int, a: str, b: str, outcome: float, number: int = 0) -> Verdict:
    return Verdict(number, prompt, labeler, a, b, 0, 1, outcome)


def test_every_pair_of_responses_of_different_models_is_a_verdict() -> None:
    """Of B, A, B, a file and C only A, B and C count; a is before b; ranks 2, 1, 3, 1, 1."""
    found = verdicts([item(7, "B", "A", "B", None, "C")], [judgement(7, [2, 1, 3, 1, 1])])
    assert [(one.a, one.b, one.first, one.second, one.outcome) for one in found] == [
        ("A", "B", 1, 0, 1.0),
        ("B", "C", 0, 4, 0.0),
        ("A", "B", 1, 2, 1.0),
        ("A", "C", 1, 4, 0.5),
        ("B", "C", 2, 4, 0.0),
    ]
    reversed_order = verdicts([item(7, "B", "A")], [judgement(7, [2, 1])], ["B", "A", "D"])
    assert [(one.a, one.b, one.outcome) for one in reversed_order] == [("B", "A", 0.0)]


def test_second_sights_and_skipped_items_are_no_verdicts() -> None:
    items = [item(0, "A", "B"), item(1, "A", "B", prompt="prompt 0")]
    skipped = judgement(1, [], labeler=2, skipped=True, reason="unreadable")
    found = verdicts(items, [judgement(0, [1, 2]), judgement(0, [2, 1], repeat=1), skipped, judgement(1, [1, 2])])
    assert [(one.item, one.outcome) for one in found] == [(0, 1.0), (1, 1.0)]
    assert len({one.prompt for one in found}) == 1  # two items of one prompt


def test_win_rates_by_hand() -> None:
    """Prompt p: A wins, B wins, tie; prompt q: A wins. (1/2 + 1) / 2, and the judge once for each pair of responses."""
    given = [("p", 1, 1.0, 0), ("p", 2, 0.0, 0), ("p", 3, 0.5, 0), ("q", 1, 1.0, 1)]
    found = [verdict(prompt, labeler, "A", "B", outcome, number) for prompt, labeler, outcome, number in given]
    judge = by_scores({0: [1.0, 2.0], 1: [3.0, 3.0]})  # B, and a tie
    ab, ac, bc = win_rates(found, ["A", "B", "C"], {"judge": judge})
    assert ab.estimate is not None and ab.among_these is not None
    assert ab.estimate.mean == pytest.approx(0.75)
    outcomes, prompts, labelers = [1.0, 0.0, 0.5, 1.0], ["p", "p", "p", "q"], [1, 2, 3, 1]
    expected, p = two_way_share(outcomes, prompts, labelers)
    assert (ab.estimate.low, ab.estimate.high, ab.p) == (expected.low, expected.high, p)
    assert ab.among_these.low == cluster_mean(outcomes, prompts, share=True).low
    assert (ab.comparisons, ab.prompts, ab.labelers, ab.ties) == (4, 2, 3, 0.25)
    assert ab.judges["judge"].mean == pytest.approx(0.25)  # (0 + 1/2) / 2
    assert (ac.estimate, ac.comparisons, bc.why_not) == (None, 0, "no labeler has compared these two")


def test_standings_are_logits_and_a_prompt_weighs_the_same_however_many_judge_it() -> None:
    """Three labelers on p say A, A, B; one each on q, r, s say A, B, A: odds (2/3 + 1 + 0 + 1) / (1/3 + 0 + 1 + 0)."""
    given = [("p", 1, 1.0), ("p", 2, 1.0), ("p", 3, 0.0), ("q", 1, 1.0), ("r", 2, 0.0), ("s", 3, 1.0)]
    found, why_not = standings([verdict(*one[:2], "A", "B", one[2]) for one in given], ["B", "A", "C"])
    # The first of the models is B: it stands at 1000.
    assert why_not is None and [one.name for one in found] == ["A", "B"]
    assert found[0].elo is not None and found[1].elo is not None
    assert found[0].elo.mean == pytest.approx(1000 + 400 * math.log10((8 / 3) / (4 / 3)), abs=1e-6)
    assert (found[1].elo.mean, found[0].comparisons) == (1000.0, 6)
    wins = [[[0.0, (1 - one[2]) * w], [one[2] * w, 0.0]] for one, w in zip(given, [1 / 3] * 3 + [1.0] * 3, strict=True)]
    expected = rank(wins, prompts=[one[0] for one in given], labelers=[one[1] for one in given])[1].elo
    assert (found[0].elo.low, found[0].elo.method) == (pytest.approx(expected.low), "t over prompts and labelers")


def test_a_model_that_only_lost_comes_last_however_few_have_compared_it() -> None:
    # One prompt of two models: the interval of the loser has no end. Three prompts: its end is above the baseline.
    assert [one.name for one in standings([verdict("0", 1, "A", "B", 1.0)], ["A", "B"])[0]] == ["A", "B"]
    assert [one.name for one in standings([verdict("0", 1, "A", "B", 0.0)], ["A", "B"])[0]] == ["B", "A"]
    chain = [verdict("0", 1, "A", "B", 1.0), verdict("1", 1, "A", "C", 1.0), verdict("2", 1, "B", "C", 0.0)]
    assert [one.name for one in standings(chain, ["A", "B", "C"])[0]] == ["A", "C", "B"]
    assert [one.name for one in standings(chain, ["B", "A", "C"])[0]] == ["A", "C", "B"]


def test_models_that_never_met_have_no_standings() -> None:
    apart = [verdict("p", 1, "A", "B", 0.5), verdict("p", 1, "C", "D", 0.5)]
    assert standings(apart, ["A", "B", "C", "D"])[0] == []
    assert "never met" in (standings(apart, ["A", "B", "C", "D"])[1] or "")
    assert standings([], ["A", "B"]) == ([], "no labeler has compared these two")


def test_agreement_by_hand() -> None:
    """People's ties are left out; of the rest the judge shares 1 of 2 on p (a tie and a match), 0 of 1 on q."""
    given = [("p", 1, 1.0, 0), ("p", 2, 0.0, 1), ("p", 3, 0.5, 0), ("q", 1, 1.0, 2)]
    found = [verdict(prompt, labeler, "A", "B", outcome, number) for prompt, labeler, outcome, number in given]
    judge = by_scores({0: [1.0, 1.0], 1: [0.0, 2.0], 2: [0.0, 2.0]})
    one = agreement(found, "judge", "judge@v1", judge)
    assert one is not None and one.comparisons == 3
    assert one.share.mean == pytest.approx(((0.5 + 1) / 2 + 0) / 2)
    expected, p = two_way_share([0.5, 1.0, 0.0], ["p", "p", "q"], [1, 2, 1])
    assert (one.share.low, one.share.high, one.p) == (expected.low, expected.high, p)
    assert agreement(found[2:3], "judge", "judge@v1", judge) is None


def project(home: Path, *items: Item) -> LabelStore:
    config = LabelConfig(name="people", arena=("A", "B"), prompts="world:verdicts")
    return LabelStore.create(database(home, "people"), config, items)


def label(store: LabelStore, name: str, ranks: Sequence[int]) -> None:
    """The labeler's next item gets these ranks, by response."""
    labeler = store.labeler(name)
    task = store.task(labeler)
    assert task is not None
    store.record(labeler, task.task, RankAction(ranks=list(ranks)), f"{name}-{task.task}-rank")
    store.record(labeler, task.task, SubmitAction(), f"{name}-{task.task}-submit")


def test_a_project_is_read_for_the_models_that_are_compared(tmp_path) -> None:
    with project(tmp_path, item(0, "A", "B"), item(1, "B", "C"), item(2, "A", "D")) as store:
        with pytest.raises(ConfigError, match=r"none of the 1 items of people .* is labelled"):
            read_arena(tmp_path, "people", ["A", "B", "E"])
        before = arena_digest(tmp_path, "people")
        for _ in range(3):
            label(store, "Ann", [2, 1])
        assert arena_digest(tmp_path, "people") != before
    found = read_arena(tmp_path, "people", ["A", "B", "E"])
    assert (found.models, found.missing, [one.number for one in found.items]) == (["A", "B"], ["E"], [0])
    judged = found.judged(why_not="no scorer")
    assert (judged.comparisons, judged.labelers, judged.missing) == (1, 1, ["E"])
    assert judged.pairs[0].estimate is not None and judged.pairs[0].estimate.mean == 0.0
    assert judged.why_no_agreement == "no scorer"


def test_the_digest_is_that_of_what_was_judged(tmp_path) -> None:
    assert arena_digest(tmp_path, "people") == ""
    with project(tmp_path, item(0, "A", "B"), item(1, "A", "B")) as store:
        label(store, "Ann", [1, 2])
        labelled = arena_digest(tmp_path, "people")
        task = store.task(1)
        assert task is not None
        store.record(1, task.task, NoteAction(text="a note"), "note")
        assert arena_digest(tmp_path, "people") == labelled
        store.record(1, task.task, SkipAction(reason="no"), "skip")
        assert arena_digest(tmp_path, "people") != labelled


def test_what_cannot_be_read_is_refused_with_what_there_is(tmp_path) -> None:
    with pytest.raises(ConfigError, match="a labelling project; there is none yet"):
        read_arena(tmp_path, "people", ["A", "B"])
    with project(tmp_path, item(0, "A", "B")) as store:
        label(store, "Ann", [1, 2])
    with pytest.raises(ConfigError, match="one of people"):
        read_arena(tmp_path, "peopel", ["A", "B"])
    with pytest.raises(ConfigError, match=r"people compares A, B.*two of the compared models: A, C"):
        read_arena(tmp_path, "people", ["A", "C"])


@pytest.mark.check
def test_the_report_names_the_models_and_the_page_for_labelers_does_not(tmp_path, capsys) -> None:
    with project(tmp_path, *(item(n, "sft<b>", "dpo") for n in range(3))) as store:
        for _ in range(3):
            label(store, "Ann", [2, 1])
        live = LivePage(store, "people").text()
    assert main(["label", "report", "people", "--home", str(tmp_path), "--json"]) == 0
    arena = json.loads(capsys.readouterr().out)["arena"]
    assert [(one["a"], one["b"], one["estimate"]["mean"]) for one in arena["pairs"]] == [("sft<b>", "dpo", 0.0)]
    assert main(["label", "report", "people", "--home", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "sft<b> against dpo" in said and "≥ " in said and "for this labeler alone" in said
    page = (tmp_path / "labels/people/report.html").read_text()
    assert "sft&lt;b&gt; against dpo" in page and "Models" in page
    assert "dpo" not in live and "sft" not in live and "Models" not in live


def test_tables_of_an_arena_without_standings() -> None:
    items = [item(0, "A", "B"), item(1, "C", "D")]
    arena = arena_of("people", items, [judgement(0, [1, 1]), judgement(1, [1, 2])])
    assert arena is not None
    (rates,) = arena_tables(arena.judged())
    assert rates.title == "win rates" and "no standings: some models have never met the others" in rates.note
    assert rates.texts()[1] == ["A against C", "no labeler has compared these two", "–", "0", "–", "–"]
    assert arena_of("people", items, []) is None
