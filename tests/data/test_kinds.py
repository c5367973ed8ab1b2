from __future__ import annotations

import pytest

from rlhf_pipeline.data.kinds import as_kind, ranks_of, tied_rows
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.errors import DataError


def ranking(measure: str, *values: float) -> Record:
    return Record("ranking", "p", ("a", "b", "c"), (True, False, True), extra={measure: values})


def test_a_pair_gives_its_chosen_side_and_its_prompt(pair):
    record = pair("p", "a", "b", (False, True), prompt_ids=(1,), completion_ids=((2,), (3,)))
    (demonstration,), _ = as_kind([record], "demonstration")
    assert (demonstration.completions, demonstration.ended) == (("a",), (False,))
    assert demonstration.completion_ids == ((2,),)
    (text,), _ = as_kind([record], "text")
    assert (text.prompt, text.completions, text.ended, text.completion_ids) == (
        None,
        ("pa",),
        (False,),
        ((1, 2),),
    )
    (prompt,), _ = as_kind([record], "prompt")
    assert (prompt.prompt, prompt.completions, prompt.prompt_ids) == ("p", (), (1,))


def test_prompts_come_once_each(pair):
    prompts, dropped = as_kind([pair("p"), pair("q"), pair(" p", "x", "y")], "prompt")
    assert [record.prompt for record in prompts] == ["p", "q"]
    assert dropped == {"duplicate_prompt": 1}


@pytest.mark.parametrize(("measure", "values"), [("ranks", (2, 1, 2)), ("scores", (0.5, 3, 0.5))])
def test_a_ranking_gives_its_untied_pairs_and_its_best(measure, values):
    pairs, _ = as_kind([ranking(measure, *values)], "pair")
    assert [(record.completions, record.ended) for record in pairs] == [
        (("b", "a"), (False, True)),
        (("b", "c"), (False, True)),
    ]
    (best,), _ = as_kind([ranking(measure, *values)], "demonstration")
    assert best.completions == ("b",)


def test_a_ranking_of_ties_only_is_counted():
    assert as_kind([ranking("ranks", 1, 1, 1)], "pair") == ([], {"tied_ranking": 1})


def test_preferences_stay_whole_but_for_rankings_of_ties_only(pair):
    some, none = ranking("scores", 0.5, 3, 0.5), ranking("ranks", 1, 1, 1)
    assert as_kind([pair(), some, none], "preference") == ([pair(), some], {"tied_ranking": 1})
    with pytest.raises(DataError, match="f holds records of kind prompt; expected for this stage: pair, ranking"):
        as_kind([Record("prompt", "p")], "preference", "f")


def test_an_order_has_no_ties(pair):
    whole, tied = ranking("ranks", 3, 1, 2), ranking("scores", 0.5, 3, 0.5)
    assert as_kind([pair(), whole, tied], "order") == ([pair(), whole], {})
    assert tied_rows([pair(), whole]) == []
    (fault,) = tied_rows([whole, Record("ranking", "p", tied.completions, tied.ended, "f:7", extra=tied.extra)])
    assert fault.reason == "tied_ranking" and fault.fault.where == "f:7"
    assert "'completions[0]' and 'completions[2]' have the same score" in fault.fault.found
    assert "break the tie" in fault.fault.fix
    assert "the same rank" in tied_rows([ranking("ranks", 1, 1, 2)])[0].fault.found


@pytest.mark.parametrize(
    ("measure", "values", "ranks"),
    [("ranks", (2, 1, 2), [2, 1, 2]), ("scores", (0.5, 3, -1), [2, 1, 3]), ("ranks", (10, 30, 20), [1, 3, 2])],
)
def test_ranks_begin_at_1_for_the_best(measure, values, ranks):
    assert ranks_of(ranking(measure, *values)) == ranks


def test_texts_stay_texts_where_demonstrations_are_asked_for():
    record = Record("text", None, ("t",), (True,))
    assert as_kind([record], "demonstration") == ([record], {})


def test_what_cannot_be_made_is_refused():
    with pytest.raises(DataError, match="f holds records of kind prompt; expected for this stage: pair, ranking"):
        as_kind([Record("prompt", "p")], "pair", "f")
