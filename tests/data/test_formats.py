from __future__ import annotations

import pytest

from rlhf_pipeline.data.formats import count_reasons, parse
from rlhf_pipeline.errors import DataError

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
OTHER = {"role": "assistant", "content": "hum"}


def understand(*rows: dict):
    return parse([(f"f:{number}", row) for number, row in enumerate(rows, 1)], "f")


def only(*rows: dict):
    parsed = understand(*rows)
    assert not parsed.faults
    (record,) = parsed.records
    return parsed.format, record.kind, record.prompt, record.completions


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("pair", "pair", "p", ("a", "b"))),
        ({"prompt": "p", "completion": "a"}, ("demonstration", "demonstration", "p", ("a",))),
        ({"prompt": "p", "other": 1}, ("prompt", "prompt", "p", ())),
        ({"text": "t"}, ("text", "text", None, ("t",))),
        (
            {"chosen": "Q: x\nA: yes", "rejected": "Q: x\nA: yeah"},
            ("pair, implicit prompt", "pair", "Q: x\nA:", (" yes", " yeah")),
        ),
        (
            {"chosen": "Q: x\nyes", "rejected": "Q: x\nno"},
            ("pair, implicit prompt", "pair", "Q: x\n", ("yes", "no")),
        ),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: I am\n\nwell",
                "rejected": "\n\nHuman: hi\n\nAssistant: I do",
            },
            ("pair, HH transcripts", "pair", "\n\nHuman: hi\n\nAssistant:", (" I am\n\nwell", " I do")),
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "ranks": [2, 1]},
            ("ranking", "ranking", "p", ("a", "b")),
        ),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            (
                "demonstration, Alpaca",
                "demonstration",
                "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n",
                ("2",),
            ),
        ),
        (
            {"instruction": "Hi.", "input": "", "output": "Ho."},
            ("demonstration, Alpaca", "demonstration", "### Instruction:\nHi.\n\n### Response:\n", ("Ho.",)),
        ),
        (
            {"messages": [USER, BOT]},
            ("demonstration, messages, conversational", "demonstration", (USER,), ((BOT,),)),
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            ("demonstration, ShareGPT, conversational", "demonstration", (USER,), ((BOT,),)),
        ),
        (
            {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
            ("pair, conversational", "pair", (USER,), ((BOT,), (OTHER,))),
        ),
        (
            {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
            ("pair, implicit prompt, conversational", "pair", (USER,), ((BOT,), (OTHER,))),
        ),
        (
            {"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, OTHER]},  # as in UltraFeedback
            ("pair, conversational", "pair", (USER,), ((BOT,), (OTHER,))),
        ),
        (
            {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, OTHER]},
            ("pair, conversational", "pair", (USER,), ((BOT,), (OTHER,))),
        ),
        (
            {"prompt": "hi", "completion": [BOT]},
            ("demonstration, conversational", "demonstration", (USER,), ((BOT,),)),
        ),
    ],
)
def test_formats_are_detected_by_their_columns(row, expected):
    assert only(row) == expected


def test_optional_columns_are_kept():
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "",
        "chosen_ended": False,
        "rejected_ended": None,
        "prompt_ids": [5],
        "chosen_ids": [6],
        "rejected_ids": [0],
        "label_probability": 0.25,
        "split": "judge",
    }
    (record,) = understand(row).records
    assert record.ended == (False, True)
    assert (record.prompt_ids, record.completion_ids) == ((5,), ((6,), (0,)))
    assert (record.extra, record.split, record.where) == ({"label_probability": 0.25}, "judge", "f:1")


def test_a_margin_is_read_and_stays_a_column_of_its_row():
    (record,) = understand({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -0.5}).records
    assert (record.extra, record.columns) == ({"margin": -0.5}, {"margin": -0.5})


def test_identical_pairs_of_token_ids_are_skipped_and_counted():
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "a",
        "prompt_ids": [5],
        "chosen_ids": [6],
        "rejected_ids": [6],
    }
    parsed = understand(row, {**row, "rejected_ended": False}, {**row, "rejected_ids": [7]})
    assert (len(parsed.records), parsed.skipped, parsed.faults) == (2, {"identical_pair": 1}, [])


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, "missing_column"),
        ({**GOOD, "chosen": None}, "null"),
        ({**GOOD, "chosen": 3}, "wrong_type"),
        ({**GOOD, "chosen": " \n"}, "empty_completion"),
        ({**GOOD, "chosen": "b"}, "identical_pair"),
        ({**GOOD, "chosen": "\ud800"}, "not_utf8"),
        ({**GOOD, "chosen_ended": "yes"}, "wrong_type"),
        ({**GOOD, "label_probability": 1.5}, "wrong_type"),
        ({**GOOD, "label_probability": float("nan")}, "wrong_type"),
        ({**GOOD, "margin": "wide"}, "wrong_type"),
        ({**GOOD, "margin": True}, "wrong_type"),
        ({**GOOD, "margin": float("nan")}, "wrong_type"),
        ({**GOOD, "margin": float("inf")}, "wrong_type"),
        ({**GOOD, "split": 3}, "wrong_type"),
        ({**GOOD, "prompt_ids": [1]}, "missing_column"),
        ({**GOOD, "prompt_ids": [1], "chosen_ids": [True], "rejected_ids": [2]}, "wrong_type"),
        ({**GOOD, "chosen": [USER]}, "no_assistant_turn"),
        ({**GOOD, "prompt": [{"role": "system", "content": "s"}]}, "empty_prompt"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "missing_column"),
        ({**GOOD, "prompt": [{"role": "user", "content": None}]}, "null"),
        ({**GOOD, "prompt": []}, "wrong_type"),
    ],
)
def test_row_faults_have_a_reason_and_a_line(bad, reason):
    parsed = understand(GOOD, bad)
    assert (len(parsed.records), count_reasons(parsed.faults)) == (1, {reason: 1})
    assert {item.fault.where for item in parsed.faults} == {"f:2"}


def transcript(*replies: str) -> str:
    return "".join(f"\n\nHuman: q\n\nAssistant: {reply}" for reply in replies)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reasons"),
    [
        (transcript("a") + "\n\nAssistant: b", transcript("c"), {"prompts_differ": 1}),
        (transcript("a"), transcript(""), {"empty_completion": 1}),
        (transcript("a"), transcript("a"), {"identical_pair": 1}),
        (transcript("a") + "\n\nHuman: r", transcript("b"), {"no_assistant_turn": 1}),
        (transcript("a Human: r"), transcript("b"), {"no_assistant_turn": 1}),
        (transcript("a Human: r"), transcript("b Human: r"), {"no_assistant_turn": 1}),
        ("none", transcript("b"), {"no_assistant_turn": 1}),
        (transcript("x", "a Human: r"), transcript("y", "b"), {"no_assistant_turn": 1, "prompts_differ": 1}),
        (transcript("a Human right"), transcript("b"), {}),
    ],
)
def test_faults_of_hh_transcripts(chosen, rejected, reasons):
    good = {"chosen": transcript("a"), "rejected": transcript("b")}
    assert count_reasons(understand(good, {"chosen": chosen, "rejected": rejected}).faults) == reasons


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"chosen": "Q: x no", "rejected": "R: x yes"}, "prompts_differ"),
        ({"chosen": "Q: x no", "rejected": "Q: x no"}, "identical_pair"),
        ({"chosen": "Q: x no", "rejected": [USER, BOT]}, "wrong_type"),
        ({"chosen": [USER, BOT], "rejected": [{**USER, "content": "x"}, BOT]}, "prompts_differ"),
    ],
)
def test_faults_of_implicit_prompts(bad, reason):
    assert count_reasons(understand({"chosen": "Q: x no", "rejected": "Q: x yes"}, bad).faults) == {reason: 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"completions": ["a"], "ranks": [1]}, "wrong_type"),
        ({"completions": ["a", "b"], "ranks": [1]}, "wrong_type"),
        ({"completions": ["a", "b"], "ranks": [1, "2"]}, "wrong_type"),
        ({"completions": ["a", ""], "ranks": [1, 2]}, "empty_completion"),
        ({"completions": ["a", None], "ranks": [1, 2]}, "wrong_type"),
        ({"completions": "ab", "ranks": [1, 2]}, "wrong_type"),
        ({"completions": ["a", "b"], "ranks": [1, 2], "ended": [True]}, "wrong_type"),
        (
            {"completions": ["a", "b"], "ranks": [1, 2], "prompt_ids": [1], "completion_ids": [[1]]},
            "wrong_type",
        ),
    ],
)
def test_faults_of_rankings(bad, reason):
    good = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
    assert count_reasons(understand(good, {"prompt": "p", **bad}).faults) == {reason: 1}


def test_a_file_without_rows_or_known_columns_is_refused():
    with pytest.raises(DataError, match="f: no rows"):
        parse([], "f")
    with pytest.raises(DataError, match="columns answer, question; expected one of the column sets"):
        understand({"question": "q", "answer": "a"})


def test_the_format_is_that_of_most_rows():
    parsed = understand({"prompt": "p"}, GOOD, GOOD)
    assert parsed.format == "pair"
    assert count_reasons(parsed.faults) == {"missing_column": 1}


def test_faults_never_show_the_text_of_a_row():
    secret = "swordfish"
    rows = [{"prompt": secret, "chosen": secret, "rejected": secret}, {"prompt": [secret], "chosen": 1}, GOOD]
    assert all(secret not in str(item.fault) for item in understand(*rows).faults)


@pytest.mark.parametrize("column", ["Question", "promt", "prompts"])
def test_a_misspelt_prompt_is_named(column):
    parsed = understand(
        {column: "q", "chosen": "Paris", "rejected": "Rome"}, {column: "q", "chosen": "a b", "rejected": "a c"}
    )
    (fault,) = parsed.faults
    assert fault.reason == "prompts_differ"
    assert f"the column {column!r} is not read; did you mean prompt?" in str(fault.fault)
    assert parsed.unread == column


def test_columns_that_are_no_prompt_are_not_suggested():
    row = {"chosen": "Paris", "rejected": "Rome", "prompt_id": "7", "source": "x", "score_chosen": 1}
    parsed = understand(row, {**row, "question": None})
    assert "is not read" not in str(parsed.faults[0].fault) + str(parsed.faults[1].fault)
    assert understand({"prompt": "p", "question": "q", "chosen": "a", "rejected": "b"}).unread is None
