"""The columns of public data sets, with invented rows, and the records that they must give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.data.formats import SCHEMAS, count_reasons, parse
from rlhf_pipeline.data.kinds import as_kind, ranks_of
from rlhf_pipeline.data.load import read_records

YES, NO = "Yes, it does.", "No."


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [turn("user", "Does it rain?")]
SAID_YES, SAID_NO = [turn("assistant", YES)], [turn("assistant", NO)]


def rating(score: int) -> dict[str, str]:
    return {"Rating": str(score), "Rationale": "because"}


def reply(text: str, rank: int | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "text": text, "rank": rank, "review_result": True, "deleted": False, **more}


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "prompter", "text": text, "rank": None, "review_result": True, "deleted": False, **more}


TREE = {
    "message_tree_id": "m1",
    "tree_state": "ready_for_export",
    "prompt": {
        **asked("Does it rain?", message_id="m1"),
        "replies": [
            {
                **reply(NO, 1, message_id="m2"),
                "replies": [
                    {
                        **asked("Sure?", message_id="m4"),
                        "replies": [
                            reply("Quite.", 0, message_id="m5", replies=[]),
                            reply("Hm.", 1, message_id="m6", replies=[]),
                            reply("Spam", 2, message_id="m7", replies=[], deleted=True),
                        ],
                    }
                ],
            },
            reply(YES, 0, message_id="m3", replies=[]),
        ],
    },
}
FLAT = [
    {"message_id": "m1", "parent_id": None, **asked("Does it rain?"), "lang": "en", "message_tree_id": "m1"},
    {"message_id": "m2", "parent_id": "m1", **reply(NO, 1), "lang": "en", "message_tree_id": "m1"},
    {"message_id": "m3", "parent_id": "m1", **reply(YES, 0), "lang": "en", "message_tree_id": "m1"},
    {"message_id": "m4", "parent_id": "m2", **asked("Sure?"), "lang": "en", "message_tree_id": "m1"},
    {"message_id": "m5", "parent_id": "m4", **reply("Quite.", 0), "lang": "en", "message_tree_id": "m1"},
    {"message_id": "m6", "parent_id": "m4", **reply("Hm.", 1), "lang": "en", "message_tree_id": "m1"},
    {"message_id": "m7", "parent_id": "m4", **reply("Spam", 2), "deleted": True, "message_tree_id": "m1"},
]
OASST = [
    ("ranking", tuple(ASKED), (tuple(SAID_NO), tuple(SAID_YES)), [2, 1]),
    (
        "ranking",
        (*ASKED, *SAID_NO, turn("user", "Sure?")),
        ((turn("assistant", "Quite."),), (turn("assistant", "Hm."),)),
        [1, 2],
    ),
]
POST = {"id": "t3", "post": "It rains.", "title": "Rain", "subreddit": "weather", "site": None, "article": None}
NEWS = {"id": "n1", "post": None, "title": "Rain", "subreddit": None, "site": "cnn", "article": "It rains."}
SUMMARIES = [{"text": " no", "policy": "sup1", "note": "ok"}, {"text": " wet", "policy": "ref", "note": ""}]
PAIR = ("pair", "Does it rain?", (YES, NO), None)
CHAT_PAIR = ("pair", tuple(ASKED), (tuple(SAID_YES), tuple(SAID_NO)), None)
ULTRA = {"prompt": "Does it rain?", "chosen": [*ASKED, *SAID_YES], "rejected": [*ASKED, *SAID_NO]}

SETS: dict[str, tuple[list[dict[str, Any]], str, list[tuple], str]] = {
    "UltraFeedback, binarized": (
        [ULTRA | {"prompt_id": "a", "messages": [*ASKED, *SAID_YES], "score_chosen": 8.0, "score_rejected": 5.0}],
        "pair, conversational",
        [CHAT_PAIR],
        "messages, prompt_id",
    ),
    "UltraFeedback": (
        [
            {
                "source": "evol",
                "instruction": "Does it rain?",
                "models": ["a", "b", "c"],
                "completions": [
                    {
                        "model": model,
                        "response": text,
                        "fine-grained_score": fine,
                        "overall_score": overall,
                        "annotations": {"helpfulness": rating(4)},
                    }
                    for model, text, fine, overall in (("a", NO, 2.5, 10.0), ("b", YES, 4.75, 8.0), ("c", "?", 1.0, 1))
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
        ],
        "ranking, UltraFeedback",
        [("ranking", "Does it rain?", (NO, YES, "?"), [2, 1, 3])],
        "correct_answers, incorrect_answers, models, source",
    ),
    "HelpSteer2": (
        [
            {
                "prompt": prompt,
                "response": text,
                "helpfulness": score,
                "correctness": 3,
                "coherence": 4,
                "complexity": 1,
                "verbosity": 1,
            }
            for prompt, text, score in (("Rain?", NO, 1), ("Rain?", YES, 4), ("Snow?", "So.", 2), ("Snow?", "Ha.", 2))
        ],
        "ranking, HelpSteer2 by helpfulness",
        [("ranking", "Rain?", (NO, YES), [2, 1]), ("ranking", "Snow?", ("So.", "Ha."), [1, 1])],
        "coherence, complexity, correctness, verbosity",
    ),
    "HelpSteer2, preference": (
        [
            {
                "split": "train",
                "prompt": "Does it rain?",
                "response_1": first,
                "response_2": second,
                "preference_strength": strength,
                "preference_statement": "x",
            }
            for first, second, strength in ((YES, NO, -2), (NO, YES, 1), (YES, NO, 0))
        ],
        "pair, HelpSteer2",
        [PAIR, PAIR],
        "preference_statement",
    ),
    "HelpSteer3": (
        [
            {
                "domain": "general",
                "language": "en",
                "context": ASKED,
                "response1": first,
                "response2": second,
                "overall_preference": strength,
                "individual_preference": [{"score": strength, "reasoning": "x"}],
            }
            for first, second, strength in ((YES, NO, -3), (NO, YES, 2), (NO, YES, 0))
        ],
        "pair, HelpSteer3, conversational",
        [CHAT_PAIR, CHAT_PAIR],
        "domain, individual_preference, language",
    ),
    "two responses with a strength": (
        [{"prompt": "Does it rain?", "response_1": NO, "response_2": YES, "preference": 3}],
        "pair, two responses with a strength",
        [PAIR],
        "",
    ),
    "SHP": (
        [
            {
                "post_id": "p",
                "history": "Does it rain?",
                "human_ref_A": first,
                "human_ref_B": second,
                "labels": label,
                "score_A": 9,
                "score_B": 4,
            }
            for first, second, label in ((YES, NO, 1), (NO, YES, 0))
        ],
        "pair, SHP",
        [PAIR, PAIR],
        "post_id, score_A, score_B",
    ),
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: Does it rain?\n\nAssistant: ",
                "answers": [
                    {"answer": YES, "model": "a", "rank": 1.0},
                    {"answer": "?", "model": "b", "rank": 3.0},
                    {"answer": NO, "model": "c", "rank": 2.0},
                ],
                "turns": 1,
                "num_responses": 3,
                "source": ["x"],
                "good_natured": True,
            }
        ],
        "ranking, Nectar",
        [("ranking", "\n\nHuman: Does it rain?\n\nAssistant: ", (YES, "?", NO), [1, 3, 2])],
        "good_natured, num_responses, source, turns",
    ),
    "OpenAssistant, trees": ([TREE], "ranking, OpenAssistant trees, conversational", OASST, "tree_state"),
    "OpenAssistant, flat": (FLAT, "ranking, OpenAssistant, conversational", OASST, "lang, message_tree_id"),
    "TL;DR comparisons": (
        [
            {"info": POST, "summaries": SUMMARIES, "choice": 1, "worker": "w", "batch": "batch3", "split": "train"},
            {"info": NEWS, "summaries": SUMMARIES, "choice": 0, "worker": "w", "batch": "cnndm0", "split": "valid2"},
        ],
        "pair, TL;DR comparisons",
        [
            ("pair", "SUBREDDIT: r/weather\n\nTITLE: Rain\n\nPOST: It rains.\n\nTL;DR:", (" wet", " no"), None),
            ("pair", "TITLE: Rain\n\nIt rains.\n\nTL;DR:", (" no", " wet"), None),
        ],
        "batch, worker",
    ),
    "Capybara-DPO": (
        [
            ULTRA
            | {
                "source": "x",
                "conversation": [{"input": "Does it rain?", "output": YES}],
                "rating_chosen": 5,
                "rating_rejected": 4,
                "chosen_model": "a",
            }
        ],
        "pair, conversational",
        [CHAT_PAIR],
        "chosen_model, conversation, source",
    ),
    "PKU-SafeRLHF": (
        [
            {
                "prompt": "Does it rain?",
                "response_0": first,
                "response_1": second,
                "is_response_0_safe": True,
                "is_response_1_safe": True,
                "better_response_id": better,
                "safer_response_id": 0,
            }
            for first, second, better in ((YES, NO, 0), (NO, YES, 1))
        ],
        "pair, PKU-SafeRLHF",
        [PAIR, PAIR],
        "is_response_0_safe, is_response_1_safe, safer_response_id",
    ),
    "Skywork-Reward": (
        [{"chosen": ULTRA["chosen"], "rejected": ULTRA["rejected"], "source": "x"}],
        "pair, implicit prompt, conversational",
        [CHAT_PAIR],
        "source",
    ),
    "Tulu-3 preferences": ([ULTRA | {"id": "1", "source": "x"}], "pair, conversational", [CHAT_PAIR], "id, source"),
    "HH": (
        [
            {
                "chosen": f"\n\nHuman: Does it rain?\n\nAssistant: {YES}",
                "rejected": f"\n\nHuman: Does it rain?\n\nAssistant: {NO}",
            }
        ],
        "pair, HH transcripts",
        [("pair", "\n\nHuman: Does it rain?\n\nAssistant:", (f" {YES}", f" {NO}"), None)],
        "",
    ),
    "orca-dpo-pairs": (
        [
            {"system": "Be brief.", "question": "Does it rain?", "chosen": "Sure, it does.", "rejected": "Sure, no."},
            {"system": "", "question": "Snow?", "chosen": YES, "rejected": NO},
        ],
        "pair, the prompt is 'system' and 'question', conversational",
        [
            (
                "pair",
                (turn("system", "Be brief."), *ASKED),
                ((turn("assistant", "Sure, it does."),), (turn("assistant", "Sure, no."),)),
                None,
            ),
            ("pair", (turn("user", "Snow?"),), (tuple(SAID_YES), tuple(SAID_NO)), None),
        ],
        "",
    ),
    "question and replies that begin alike": (
        [{"question": "Does it rain?", "chosen": "Sure, yes", "rejected": "Sure, no"}],
        "pair, the prompt is 'question'",
        [("pair", "Does it rain?", ("Sure, yes", "Sure, no"), None)],
        "",
    ),
    "Alpaca pairs": (
        [{"instruction": "Ask.", "input": "rain", "chosen": YES, "rejected": NO}],
        "pair, the prompt is 'instruction' and 'input'",
        [("pair", "### Instruction:\nAsk.\n\n### Input:\nrain\n\n### Response:\n", (YES, NO), None)],
        "",
    ),
    "ShareGPT": (
        [
            {
                "id": "1",
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "Does it rain?"},
                    {"from": "gpt", "value": YES},
                ],
            }
        ],
        "demonstration, ShareGPT, conversational",
        [("demonstration", (turn("system", "Be brief."), *ASKED), (tuple(SAID_YES),), None)],
        "id",
    ),
    "ShareGPT pairs": (
        [
            {
                "conversations": [{"from": "human", "value": "Does it rain?"}],
                "chosen": {"from": "gpt", "value": YES},
                "rejected": {"from": "gpt", "value": NO},
            }
        ],
        "pair, ShareGPT, conversational",
        [CHAT_PAIR],
        "",
    ),
    "Alpaca": (
        [{"instruction": "Does it rain?", "input": "", "output": YES, "text": "Below is ..."}],
        "demonstration, Alpaca",
        [("demonstration", "### Instruction:\nDoes it rain?\n\n### Response:\n", (YES,), None)],
        "text",
    ),
    "Alpaca with system and history": (
        [
            {
                "instruction": "Sure?",
                "input": "of rain",
                "output": NO,
                "system": "Be brief.",
                "history": [["Does it rain?", YES]],
            }
        ],
        "demonstration, Alpaca, conversational",
        [
            (
                "demonstration",
                (turn("system", "Be brief."), *ASKED, *SAID_YES, turn("user", "Sure?\nof rain")),
                (tuple(SAID_NO),),
                None,
            )
        ],
        "",
    ),
    "KTO": (
        [
            {"prompt": "Does it rain?", "completion": YES, "label": True},
            {"prompt": "Does it rain?", "completion": NO, "label": False},
        ],
        "demonstration, labelled",
        [("labelled", "Does it rain?", (YES,), None), ("labelled", "Does it rain?", (NO,), None)],
        "",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_public_data_set_is_read_as_what_it_is(name, jsonl):
    rows, label, expected, not_read = SETS[name]
    found = read_records(jsonl(*rows))
    assert found.format == label
    assert [record.kind for record in found.records] == [kind for kind, *_ in expected]
    for record, (_, prompt, completions, ranks) in zip(found.records, expected, strict=True):
        assert (record.prompt, record.completions) == (prompt, completions)
        assert ranks is None or ranks_of(record) == ranks
    assert ", ".join(found.not_read) == not_read


def test_answers_without_ranks_are_no_ranking():
    parsed = parse([("f:1", {"prompt": "2 + 2", "answers": ["4", "four"]})], "f")
    assert ([record.kind for record in parsed.records], parsed.not_read) == (["prompt"], ("answers",))


def test_ties_are_left_out_and_counted():
    for name in ("HelpSteer2, preference", "HelpSteer3"):
        rows = [(f"f:{number}", row) for number, row in enumerate(SETS[name][0], 1)]
        assert parse(rows, "f").skipped == {"tied_pair": 1}


def test_the_replies_of_a_tree_are_named_by_their_line():
    assert [record.where for record in parse([("f:7", TREE)], "f").records] == ["f:7 (prompt 1)", "f:7 (prompt 2)"]
    flat = parse([(f"f:{number}", row) for number, row in enumerate(FLAT, 1)], "f")
    assert [record.where for record in flat.records] == ["f:1", "f:4"]


def test_the_best_reply_is_the_demonstration_of_a_ranking(jsonl):
    found = read_records(jsonl(*SETS["HelpSteer2"][0][:2]))
    (demonstration,) = as_kind(found.records, "demonstration")[0]
    assert demonstration.completions == (YES,)


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("PKU-SafeRLHF", {"better_response_id": 2}, "'better_response_id' is neither 0 nor 1"),
        ("PKU-SafeRLHF", {"response_0": ""}, "'response_0' is empty"),
        ("PKU-SafeRLHF", {"response_1": YES}, "'response_0' equals 'response_1'"),
        ("SHP", {"labels": None}, "'labels' is null"),
        ("SHP", {"human_ref_B": 3}, "'human_ref_B' is a number"),
        ("HelpSteer3", {"overall_preference": "-3"}, "'overall_preference' is text"),
        ("HelpSteer2", {"helpfulness": None}, "'helpfulness' is null"),
        ("TL;DR comparisons", {"info": {"title": "x"}}, "'info' has no post"),
        ("TL;DR comparisons", {"summaries": [{"text": " a"}, {}]}, "'summaries[1].text' is null"),
        ("Nectar", {"answers": ["a", "b"]}, "'answers' is not a list of objects"),
        ("Nectar", {"answers": [{"answer": "a"}, {"answer": "b"}]}, "'ranks[0]' is null"),
        ("UltraFeedback", {"completions": [{"response": "a"}, {"response": "b"}]}, "'scores[0]' is null"),
        ("Alpaca with system and history", {"history": ["a"]}, "'history' is not a list of [question, answer]"),
        ("ShareGPT pairs", {"chosen": "a"}, "are not turns"),
    ],
)
def test_what_is_wrong_in_a_row_is_told_by_the_names_of_its_columns(name, wrong, told):
    good = SETS[name][0]
    parsed = parse([("f:1", {**good[0], **wrong}), *((f"f:{n}", row) for n, row in enumerate(good * 2, 2))], "f")
    assert {item.fault.where for item in parsed.faults} == {"f:1"}
    assert told in str(parsed.faults[0].fault)


def test_labelled_completions_are_no_demonstrations(jsonl):
    rows = SETS["KTO"][0]
    records = read_records(jsonl(*rows)).records
    assert [record.extra["label"] for record in records] == [True, False]
    with pytest.raises(Exception, match=r"holds records of kind labelled.*keep only the rows whose label is true"):
        as_kind(records, "demonstration")
    assert [record.prompt for record in as_kind(records, "prompt")[0]] == ["Does it rain?"]
    assert as_kind(records, "labelled") == (records, {})
    (pair,) = read_records(jsonl({"prompt": "p", "chosen": "a", "rejected": "b", "rejected_ended": False})).records
    made, _ = as_kind([pair], "labelled")
    assert [(one.completions, one.ended, one.extra) for one in made] == [
        (("a",), (True,), {"label": True}),
        (("b",), (False,), {"label": False}),
    ]
    chat = [{"messages": [*ASKED, *SAID_YES], "label": 1}, {"messages": [*ASKED, *SAID_NO], "label": 0}]
    assert [record.kind for record in read_records(jsonl(*chat)).records] == ["labelled", "labelled"]
    for good, bad in ((1, -1), ("True", "false"), (1.0, 0.0), ("1", "0")):
        texts = [{"prompt": "p", "completion": "a", "label": good}, {"prompt": "p", "completion": "b", "label": bad}]
        assert [record.extra["label"] for record in read_records(jsonl(*texts)).records] == [True, False]
    classes = [{"prompt": "p", "completion": "a", "label": "good"}, {"prompt": "p", "completion": "b", "label": 3}]
    found = read_records(jsonl(*classes))
    assert ([record.kind for record in found.records], found.not_read) == (["demonstration"] * 2, ("label",))


def test_a_label_that_is_missing_is_a_fault():
    parsed = parse([("f:1", SETS["KTO"][0][0]), ("f:2", {"prompt": "p", "completion": "a", "label": None})], "f")
    assert count_reasons(parsed.faults) == {"null": 1}


def test_numbers_and_labels_in_csv(tmp_path):
    def records(header: str, *lines: str) -> list[Any]:
        path = tmp_path / "rows.csv"
        path.write_text("\n".join((header, *lines)) + "\n")
        return read_records(str(path)).records

    found = records("prompt,completion,label", "p,a,True", "p,b,False")
    assert [(record.kind, record.extra["label"]) for record in found] == [("labelled", True), ("labelled", False)]
    (pair,) = records("prompt,response_0,response_1,better_response_id", "p,a,b,1")
    assert pair.completions == ("b", "a")
    (ranking,) = records("prompt,response,helpfulness", "p,a,1", "p,b,4")
    assert ranks_of(ranking) == [2, 1]
    (pair,) = records("prompt,response_1,response_2,preference", "p,a,b,-2")
    assert pair.completions == ("a", "b")


def test_scores_that_contradict_the_label_are_counted():
    def against(**values: Any) -> dict[str, int]:
        return dict(parse([("f:1", values)], "f").against)

    for chosen, rejected in (("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")):
        for first, second, expected in ((2, 1, {}), (1, 1, {"equal": 1}), (1, 2, {"contradicted": 1}), (None, 2, {})):
            sides = {"prompt": "p", "chosen": "a", "rejected": "b"}
            assert against(**sides, **{chosen: first, rejected: second}) == expected
    drawn = {"chosen_score": 1.0, "rejected_score": 2.0, "label_probability": 0.3}
    assert against(prompt="p", chosen="a", rejected="b", **drawn) == {}
    ranked = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
    assert against(**ranked, scores=[3, 2, 1]) == against(**ranked, scores=[3, 3, 1]) == {}
    assert against(**ranked, scores=[1, 2, 3]) == against(**ranked, scores=[3, 1, 2]) == {"contradicted": 1}


def test_what_is_not_read_and_what_is_contradicted_is_a_note():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2, "margin": 0.5}
    found = parse([("f:1", row), ("f:2", {**row, "score_rejected": 1})], "f")
    assert found.notes(functions=False)[0] == "not read: margin"
    assert found.notes(functions=True)[0] == "read by reward functions only: margin"
    assert found.notes(functions=False, use_margin=False)[1].startswith("`use_margin: true` subtracts")
    assert [note for note in found.notes(functions=False, use_margin=True) if "margin" in note] == []
    assert found.notes() == [
        "not read: margin (except by reward functions)",
        "scores contradict the label in 1 of 2 rows: the label is used, not the scores",
        "scores are equal in 1 of 2 rows: the label is used, not the scores",
    ]
    assert parse([("f:1", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": None})], "f").notes() == []


TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_template_values_stay_with_the_messages(tools):
    row = {"messages": [*ASKED, *SAID_YES], "tools": tools, "chat_template_kwargs": {"thinking": False}}
    parsed = parse([("f:1", row)], "f")
    values = {"tools": TOOLS, "chat_template_kwargs": {"thinking": False}}
    assert (parsed.records[0].extra, parsed.not_read) == (values, ())
    (prompt,) = as_kind(parsed.records, "prompt")[0]
    assert prompt.extra == values
    plain = parse([("f:1", {"prompt": "p", "completion": "a", "tools": tools})], "f")
    assert (plain.records[0].extra, plain.not_read) == ({}, ("tools",))
    wrong = parse([("f:1", {**row, "tools": "{"})], "f")
    assert "'tools' is not a list" in str(wrong.faults[0].fault)


def test_what_the_template_does_not_read_is_a_note():
    row = {"messages": [*ASKED, *SAID_YES], "tools": TOOLS, "chat_template_kwargs": {"thinking": False}}
    parsed = parse([("f:1", row), ("f:2", {**row, "tools": None, "chat_template_kwargs": None})], "f")
    assert parsed.notes() == parsed.notes("{% if tools %}{{ tools }}{% endif %}{{ thinking }}") == []
    assert parsed.notes("{{ messages }}") == ["not read by the chat template: thinking, tools"]


def test_plain_prompts_of_a_chat_model_are_named():
    plain = parse([("f:1", {"prompt": "p", "chosen": "a", "rejected": "b"})], "f")
    (note,) = plain.notes("{{ messages }}")
    assert "without its chat template" in note and "`text_as_chat: true`" in note
    assert plain.notes("{{ messages }}", text_as_chat=True) == plain.notes() == []


def test_a_turn_that_calls_a_tool_may_have_no_text():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rain", "arguments": {}}}]}
    answer = {"role": "tool", "name": "rain", "content": "wet"}
    (record,) = parse([("f:1", {"messages": [*ASKED, call, answer, *SAID_YES]})], "f").records
    assert record.prompt[1] == {"role": "assistant", "content": "", "tool_calls": call["tool_calls"]}
    (record,) = parse([("f:1", {"messages": [*ASKED, call]})], "f").records
    assert record.completions[0][0]["content"] == ""


def test_a_system_turn_comes_before_the_prompt_in_every_format():
    system = turn("system", "Be brief.")
    for row in (
        {"prompt": "Does it rain?", "completion": YES},
        {"prompt": "Does it rain?", "chosen": YES, "rejected": NO},
        {"prompt": ASKED, "chosen": SAID_YES, "rejected": SAID_NO},
        {"chosen": [*ASKED, *SAID_YES], "rejected": [*ASKED, *SAID_NO]},
        {"prompt": "Does it rain?", "chosen": [*ASKED, *SAID_YES], "rejected": [*ASKED, *SAID_NO]},
        {"prompt": ASKED, "chosen": [*ASKED, *SAID_YES], "rejected": [*ASKED, *SAID_NO]},
        {"prompt": ASKED, "chosen": [system, *ASKED, *SAID_YES], "rejected": [system, *ASKED, *SAID_NO]},
        {"prompt": "Does it rain?", "completions": [YES, NO], "ranks": [1, 2]},
        {"messages": [*ASKED, *SAID_YES]},
        {"prompt": "Does it rain?"},
    ):
        (record,) = parse([("f:1", {**row, "system": "Be brief."})], "f").records
        assert record.prompt == (system, *ASKED)
        assert all(len(completion) == 1 for completion in record.completions)
    same = {"messages": [system, *ASKED, *SAID_YES], "system": "Be brief."}
    assert parse([("f:1", same)], "f").records[0].prompt == (system, *ASKED)
    assert count_reasons(parse([("f:1", {**same, "system": "Be long."})], "f").faults) == {"prompts_differ": 1}
    empty = [("f:1", {"prompt": "p", "completion": "a", "system": ""})]
    assert parse(empty, "f").records[0].prompt == "p"


def test_columns_are_renamed_before_the_format_is_detected(jsonl):
    source = jsonl({"q": "Does it rain?", "good": YES, "bad": NO, "prompt": "other"})
    found = read_records(source, columns=(("chosen", "good"), ("prompt", "q"), ("rejected", "bad")))
    assert (found.format, found.records[0].prompt, found.records[0].completions) == ("pair", "Does it rain?", (YES, NO))
    with pytest.raises(Exception, match=r"column_mapping\.prompt.*no column 'qq'.*did you mean 'q'"):
        read_records(source, columns=(("prompt", "qq"),))
    with pytest.raises(Exception, match=r"column_mapping\.promt.*no format has a column 'promt'.*'prompt'"):
        read_records(source, columns=(("promt", "q"),))


def test_every_format_is_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for schema in SCHEMAS:
        lacking = [column for column in schema.columns if f"`{column}`" not in text]
        assert not lacking, f"{schema.label}: {lacking}"
