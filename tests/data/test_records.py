from __future__ import annotations

from rlhf_pipeline.data.records import Record, plain


def test_prompt_key_ignores_unicode_form_and_outer_white_space():
    composed = Record("prompt", "caf\u00e9")
    decomposed = Record("prompt", " cafe\u0301\n")
    assert composed.prompt_key == decomposed.prompt_key
    assert composed.prompt_key != Record("prompt", "cafe").prompt_key


def test_key_of_a_text_is_the_text_and_of_bare_ids_the_ids():
    assert Record("text", None, ("once upon",), (True,)).key == "once upon"
    assert Record("prompt", "", prompt_ids=(3, 14)).key == "ids 3 14"


def test_conversations_are_recognised_and_made_plain():
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    assert Record("prompt", messages).conversational
    assert not Record("prompt", "hi").conversational
    assert Record("text", None, (messages,), (True,)).conversational
    assert plain(messages) == "user: hi\n\nassistant: ho"


def test_canonical_form_leaves_out_where_a_row_came_from():
    here = Record("prompt", "hi", where="a.jsonl:1", split="train")
    there = Record("prompt", "hi", where="b.csv:9")
    assert here.canonical() == there.canonical()
    assert here.canonical() != Record("prompt", "ho").canonical()
